"""Which rows a step has: their number and padding in the curve; and what is told of an error: rank, step and rows."""

import sys
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

from branchmerge.data.batch import Batch
from branchmerge.data.row_names import on_rows, rows_named
from branchmerge.errors import UserError
from branchmerge.student import ranks
from branchmerge.student.module import Student


class StepRows(Callback):
    """Logs `rows`, `skipped_rows` and `padding_share` of every step, over all processes; tells in a line where the
    training failed.

    The last of the callbacks: what those before it do between two steps is not done on a row of the next.
    """

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
        """A user's mistake has its own line, and whoever ends the training knows it."""
        if isinstance(exception, UserError | SystemExit | KeyboardInterrupt):
            return
        where = f"{self._when(trainer.global_step)} {self._how(exception)}"
        print(f"rank {ranks.rank()} failed {where}", file=sys.stderr, flush=True)

    def _when(self, step: int) -> str:
        if self._in_work:
            return f"at step {step}"
        return f"after step {step}" if step else "before the first step"

    def _how(self, error: BaseException) -> str:
        if _lost_another(error):
            first_line, _, _ = str(error).strip().partition("\n")
            return f"as it could not reach another rank: {first_line}"
        rows = rows_named(error) or on_rows(self._in_work)
        return f"{rows} ({type(error).__name__})".strip()

    def _begin_step(self) -> None:
        self._rows, self._tokens = 0, 0


def _lost_another(error: BaseException) -> bool:
    """Whether it comes of another process's death; gloo tells that in a RuntimeError like any other."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
