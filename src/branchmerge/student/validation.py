"""Validation loss on held-out trajectories of every domain, which shows what a branch forgets while it trains."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from lightning import LightningModule, Trainer

from branchmerge.data.batch import Batch, make_batch, make_idle_batch, supervised_tokens
from branchmerge.data.packing import pack
from branchmerge.data.row_names import naming
from branchmerge.data.template import Document
from branchmerge.student import ranks
from branchmerge.student.between_steps import BetweenSteps, is_due, untouched
from branchmerge.student.context_parallel import rows_of
from branchmerge.student.ending import Ending
from branchmerge.student.module import Student

Rows = list[list[Document]]
"""Documents of each packed row"""


class Validation(BetweenSteps):
    """Logs `val_loss/<part>`: the mean loss over the learned tokens of a part's held-out trajectories.

    Runs before the first step, every `every` steps, and after the last one. A value at step n is that of the weights
    after n steps.
    """

    def __init__(
        self, held_out: Mapping[str, Sequence[Document]], capacity: int, every: int | None, ending: Ending
    ) -> None:
        self.rows = {part: packed(documents, capacity) for part, documents in held_out.items()}
        self.every = every
        self.ending = ending

    def between_steps(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, Student)
        if not is_due(step, self.every, module.total_steps):
            return
        check = partial(self.ending.check, module.total_steps - step)
        with untouched(trainer, module):
            losses = {part: mean_loss(module, rows, check) for part, rows in self.rows.items()}
        for logger in trainer.loggers:
            logger.log_metrics({f"val_loss/{part}": loss for part, loss in losses.items()}, step)
        told = ", ".join(f"{part} {loss:.4f}" for part, loss in losses.items())
        ranks.say(f"step {step}: validation loss {told}")


def packed(documents: Sequence[Document], capacity: int) -> Rows:
    """The documents in packed rows; the same documents always give the same rows."""
    rows = pack([len(document) for document in documents], capacity, random.Random(0))
    return [[documents[number] for number in row] for row in rows]


def mean_loss(student: Student, rows: Rows, check: Callable[[], None]) -> float:
    """Mean loss over all learned tokens of the rows, which the processes share; `check` is called before each row."""
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    in_work: list[str] = []
    with naming(in_work):
        for batch in share(rows, *rows_of(student.packed.context)):
            check()
            # A GPU reports errors asynchronously, so any row so far may be the cause.
            in_work[:] = batch.ids if student.device.type == "cpu" else [*in_work, *batch.ids]
            total += student.packed(batch.to(student.device)).double()
        own = float(total)
    (summed,) = ranks.summed(own)
    return summed / sum(supervised_tokens(document) for row in rows for document in row)


def share(rows: Rows, rank: int, world: int) -> list[Batch]:
    """One process's rows. All processes get the same number, with idle rows at the end: a forward pass needs all."""
    places = range(rank, -(-len(rows) // world) * world, world)
    return [
        _made(rows[place], make_batch) if place < len(rows) else _made(rows[0], make_idle_batch) for place in places
    ]


def _made(row: Sequence[Document], make: Callable[[Sequence[Document], int], Batch]) -> Batch:
    with naming([document.id for document in row]):
        return make(row, 1)
