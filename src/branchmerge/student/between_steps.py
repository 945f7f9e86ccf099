"""Callbacks that look at the student between two optimizer steps and leave no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule

from branchmerge.student.ending import ToldToEndError


class BetweenSteps(Callback):
    """Calls `between_steps` once before the first step of a run, after every step, and so after the last one."""

    _seen: int | None = None

    def between_steps(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """`step` optimizer steps are done, and logged. ToldToEndError may leave it, in all processes or in none."""
        raise NotImplementedError

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self._once(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._once(trainer, module)

    def _once(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if step != self._seen:
            self._seen = step
            with suppress(ToldToEndError):
                self.between_steps(trainer, module, step)


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something is done after `step` steps: before the first, after every `every`, after the last."""
    return step in (0, last) or (every is not None and step % every == 0)


@contextmanager
def untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The student in evaluation mode, without gradients, in the precision of the training.

    Modes and random generators are put back afterwards, so what comes next is computed as if nothing had been here.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), trainer.precision_plugin.val_step_context():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        for part in modes:
            if isinstance(part, FSDPModule):  # without a backward pass the root's weights would stay whole
                part.reshard()
