"""The LightningModule around any causal LM: one packed row in, its share of the step's loss out."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from branchmerge.config import OptimConfig
from branchmerge.data.batch import Batch
from branchmerge.errors import UserError
from branchmerge.student import ranks
from branchmerge.student.between_steps import untouched
from branchmerge.student.loss import PackedLoss
from branchmerge.student.optim import make_optimizer
from branchmerge.student.trials import check_apart, check_masks, choose_loss


class Student(LightningModule):
    """A causal LM in training.

    The loss of an optimizer step is the sum over its learned tokens divided by their number, over all micro-batches
    and ranks, so splitting a step into other micro-batches does not change the update.
    """

    def __init__(
        self,
        packed: PackedLoss,
        optim: OptimConfig,
        total_steps: int,
        max_skipped: int = 0,
        spread: Callable[[PackedLoss, torch.device], None] | None = None,
        compute: torch.dtype = torch.float32,
        fused_loss: bool = False,
    ) -> None:
        """
        Args:
            max_skipped: consecutive steps without a finite loss and gradient that are skipped before training stops
            spread: shards the model over all processes and loads its weights; None if it is loaded on one device
            compute: dtype of the matrix products
            fused_loss: use liger-kernel's loss where a trial finds its results equal
        """
        super().__init__()
        self.packed = packed
        self.optim = optim
        self.total_steps = total_steps
        self.max_skipped = max_skipped
        self._spread = spread
        self._compute = compute
        self._fused_loss = fused_loss
        self.skipped_in_a_row = self.skipped = 0  # steps of the branch, those of earlier runs included
        self._since = self._waited = 0.0
        self._ended: float | None = None
        self._tokens: float
        self._supervised: float
        self._begin_step()

    @property
    def model(self) -> PreTrainedModel:
        return self.packed.model

    @property
    def counts_rows(self) -> bool:
        """Whether this process counts rows and tokens; of processes that share a row only the first does."""
        return self.packed.context is None or self.packed.context.rank == 0

    @property
    def leaves_out(self) -> bool:
        """Whether the step that ends now was skipped."""
        return self.skipped_in_a_row > 0

    def configure_model(self) -> None:
        """Called by the Trainer once the processes have met."""
        if self._spread is not None:
            self._spread(self.packed, self.trainer.strategy.root_device)
            self._spread = None

    def on_fit_start(self) -> None:
        with untouched(self.trainer, self):
            check_apart(self.packed, self.device, self._compute)
            check_masks(self.packed, self.device)
            choose_loss(self.packed, self.device, self._compute, self._fused_loss)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """This row's summed loss over the learned tokens of the whole step.

        Lightning divides by the number of micro-batches, and gradients are averaged over ranks. Both factors are
        multiplied back, so that the division by `supervised_in_step` is the only one.
        """
        if not self._shares:
            self._since = time.perf_counter() - self._waited
        share = self.packed(batch) / batch.supervised_in_step
        self._shares.append((share.detach(), batch.ids))
        if (supervised := batch.supervised) and self.counts_rows:  # an idle row has none
            self._rows += batch.ids
            self._tokens += batch.input_ids.numel()
            self._supervised += supervised
        return share * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = make_optimizer(self.model, self.optim, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm; skip the step unless loss and gradient are finite.

        Both are kept for the log. The host waits for the GPU here, and not again before the end of the next step.
        """
        limit = gradient_clip_val or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        self._grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self._losses = torch.stack([share for share, _ in self._shares]).tolist()
        self._loss, *counts = ranks.summed(sum(self._losses), self._tokens, self._supervised)
        self._tokens, self._supervised = counts
        if math.isfinite(self._loss) and math.isfinite(self._grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        self.skipped += 1
        for parameter in self.parameters():
            parameter.grad = None  # so the optimizer changes neither weight nor moments
        self._tell_of_skipping()

    def _tell_of_skipping(self) -> None:
        """Warn that the step is skipped, and name its rows; raises UserError after too many in a row."""
        by_row = zip(self._losses, self._shares, strict=True)
        broken_here = [row for loss, (_, ids) in by_row if not math.isfinite(loss) for row in ids]
        told = ranks.from_all((broken_here, self._rows))
        rows = [row for broken, _ in told for row in broken] or [row for _, own in told for row in own]
        rows = list(dict.fromkeys(rows))  # devices that share a row all name it
        found = f"loss {self._loss}, gradient {self._grad_norm}"
        said = f"step {self.trainer.global_step}: {found} on the rows {', '.join(rows)}"
        if self.skipped_in_a_row > self.max_skipped:
            raise UserError(f"{said}; lower optim.lr={self.optim.lr}, or look at these rows")
        ranks.say(f"warning: {said}; left out ({self.skipped_in_a_row} of {self.max_skipped} in a row)")

    def tell_if_broken_at_the_end(self) -> None:
        """Warn if the last steps were skipped."""
        if self.skipped_in_a_row:
            ranks.say(
                f"warning: the last {self.skipped_in_a_row} of {self.total_steps} steps had no finite loss or"
                " gradient, and the ones before them may have been bad already; look at the curve before you use it"
            )

    def on_train_batch_start(self, batch: Batch, _: int) -> None:
        """Start the clock: a step's time includes waiting for its row, but not the callbacks between two steps."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._waited = 0.0 if self._ended is None else data.came_at - self._ended
        self._step_before = self.trainer.global_step
        self._lr = float(self.trainer.optimizers[0].param_groups[0]["lr"])  # float(): torchao has a tensor that changes

    def on_train_batch_end(self, outputs: Any, batch: Batch, _: int) -> None:
        """Log once per optimizer step."""
        if self.trainer.global_step != self._step_before:
            self._log_step()
        self._ended = time.perf_counter()

    def _log_step(self) -> None:
        seconds = time.perf_counter() - self._since
        self.log("loss", self._loss, prog_bar=True)
        self.log("tokens_per_second", self._tokens / seconds, prog_bar=True)
        self.log("lr", self._lr)
        self.log("grad_norm", self._grad_norm)
        self.log("tokens", self._tokens)
        self.log("supervised_tokens", self._supervised)
        self._begin_step()

    def _begin_step(self) -> None:
        # Each row's share of the loss, still on its device, and the ids of the row's documents.
        self._shares: list[tuple[Tensor, list[str]]] = []
        self._tokens = self._supervised = 0.0
        self._rows: list[str] = []
