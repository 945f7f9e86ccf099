"""Which rows a step has: their number and padding in the curve, their names where a step fails."""

import sys
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from branchmerge.data.batch import Batch
from branchmerge.student import ranks
from branchmerge.student.module import Student


class StepRows(Callback):
    """Logs `rows`, `skipped_rows` and `padding_share` of every step, over all processes; names the rows that an error
    came with."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: tokens that a packed row could hold."""
        self.capacity = capacity
        self._in_work: list[str] = []
        self._begin_step()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        # A GPU's errors come late: of which row of the step is not known.
        self._in_work = batch.ids if module.device.type == "cpu" else [*self._in_work, *batch.ids]
        self._step_before = trainer.global_step
        assert isinstance(module, Student)
        if batch.supervised and module.counts_rows:  # an idle row has none
            self._rows += 1
            self._tokens += batch.input_ids.numel()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, index: int
    ) -> None:
        stepped = trainer.global_step != self._step_before
        if stepped or module.device.type == "cpu":
            self._in_work = []
        if not stepped:
            return
        rows, tokens = ranks.summed(self._rows, self._tokens)
        assert isinstance(module, Student)
        module.log("rows", rows)
        module.log("skipped_rows", rows if module.leaves_out else 0.0)
        module.log("padding_share", 1 - tokens / (rows * self.capacity))
        self._begin_step()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, Exception) or not (self._in_work or _lost_another(exception)):
            return
        at = f"rank {ranks.rank()} failed at step {trainer.global_step}"
        rows = f"on the rows {', '.join(self._in_work)} ({type(exception).__name__})"
        first_line, _, _ = str(exception).strip().partition("\n")
        lost = f"as it could not reach another rank: {first_line}"
        print(f"{at} {lost if _lost_another(exception) else rows}", file=sys.stderr, flush=True)

    def _begin_step(self) -> None:
        self._rows, self._tokens = 0, 0


def _lost_another(error: Exception) -> bool:
    """Whether it comes of another process's death; gloo tells that in a RuntimeError like any other."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
