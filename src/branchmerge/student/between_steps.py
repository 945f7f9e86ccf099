"""Callbacks that run between two optimizer steps and do not affect the training."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule

from branchmerge.student.ending import ToldToEndError


class BetweenSteps(Callback):
    """Calls `between_steps` once before the first step of a run, and once after each step, including the last."""

    _seen: int | None = None

    def between_steps(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Called after `step` optimizer steps, when logged; may raise ToldToEndError, in all processes or none."""
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
    """Whether an action is due after `step` steps: before the first, every `every` steps, and after the last."""
    return step in (0, last) or (every is not None and step % every == 0)


@contextmanager
def untouched(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, the student is in evaluation mode, without gradients, in the precision of the training.

    Modes and random generators are restored afterwards, so the training continues as if nothing had happened.
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
            if isinstance(part, FSDPModule):  # without a backward pass, the root's weights would stay gathered
                part.reshard()
