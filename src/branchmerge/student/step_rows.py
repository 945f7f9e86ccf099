"""Logs how many rows a step has and their padding, and names rank, step and rows if the training fails."""

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
    """Logs `rows`, `skipped_rows` and `padding_share` of every step over all processes; on an error prints where.

    It must be the last callback, so that an error in another callback between two steps is not blamed on the next row.
    """

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: tokens that a packed row can hold
        """
        self.capacity = capacity
        self._in_work: list[str] = []
        self._begin_step()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, index: int) -> None:
        # A GPU reports errors late, so any row of the step may be the cause.
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
        """Print rank, step and rows; not for a UserError, which has its own line, nor for an end on request."""
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
    """Whether another process's death caused it; gloo reports that as a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
