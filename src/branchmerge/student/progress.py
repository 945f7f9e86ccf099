"""Progress of a branch: a bar in a terminal, a line at intervals in a log."""

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from lightning import LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from branchmerge.student import ranks
from branchmerge.student.between_steps import BetweenSteps
from branchmerge.student.flops import Shapes, peak_of
from branchmerge.student.module import Student

INTERVAL = 30.0
"""Seconds between two lines in a log"""


class _Screen(Console):
    """A console whose closed pipe does not end the training."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class StepProgress(BetweenSteps):
    """Prints optimizer steps, loss, tokens/s and time left, on CUDA also memory and MFU; in the first process only."""

    def __init__(self, name: str, console: Console | None = None, interval: float = INTERVAL) -> None:
        self.name = name
        self.console = console or _Screen(soft_wrap=True)
        self.interval = interval
        self._bar: Progress | None = None
        self._flops = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Student)
        self._first, self._began, self._told = trainer.global_step, time.monotonic(), 0.0
        self._shapes = Shapes.of(module.model) if module.device.type == "cuda" else None
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)  # perhaps of an earlier branch in this process
        if ranks.is_first() and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[said]}"),
                console=self.console,
            )  # fmt: skip
            self._task: TaskID = self._bar.add_task(
                self.name, total=module.total_steps, completed=trainer.global_step, said="first step"
            )
            self._bar.start()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        super().on_train_batch_start(trainer, module, batch, index)
        if self._shapes is not None:
            assert isinstance(module, Student)
            devices = module.packed.context.size if module.packed.context else 1
            self._flops += self._shapes.flops_of(batch) / devices

    def between_steps(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, Student)
        flops, self._flops = self._flops, 0.0
        if step == self._first or not ranks.is_first():
            return
        said = self._said(trainer, module, step, flops)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, said=said)
            return
        now = time.monotonic()
        if step in (self._first + 1, module.total_steps) or now - self._told >= self.interval:
            self._told = now
            with suppress(OSError):  # such as a full disk
                self.console.print(f"{self.name}: {said}", highlight=False, markup=False)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_end(trainer, module)
        self._stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _said(self, trainer: Trainer, module: Student, step: int, flops: float) -> str:
        metrics = trainer.callback_metrics
        speed = float(metrics["tokens_per_second"])
        left = (time.monotonic() - self._began) / (step - self._first) * (module.total_steps - step)
        parts = [f"step {step}/{module.total_steps}", f"loss {float(metrics['loss']):.4f}", f"{speed:,.0f} tokens/s"]
        if module.device.type == "cuda":
            seconds = float(metrics["tokens"]) / speed
            parts.append(f"{torch.cuda.max_memory_allocated(module.device) / 2**30:.1f} GiB")
            parts.append(f"MFU {utilisation(flops / seconds, torch.cuda.get_device_name(module.device))}")
        return "  ".join([*parts, f"ETA {timedelta(seconds=round(left))}"])

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def utilisation(flops_per_second: float, card: str) -> str:
    """Percentage of the card's bfloat16 peak; n/a if FLOPs of the model or the peak of the card are not known."""
    peak = peak_of(card)
    return f"{flops_per_second / peak:.0%}" if peak and flops_per_second else "n/a"
