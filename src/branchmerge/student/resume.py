"""Callbacks that save a branch while it trains, resume it from a checkpoint, and end it on a signal."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from branchmerge.config import CheckpointConfig
from branchmerge.student import ranks
from branchmerge.student.checkpoints import Checkpoint, CheckpointFolder, Position, generators, load_state, save_state
from branchmerge.student.ending import Ending
from branchmerge.student.module import Student


class Resume(Callback):
    """Writes checkpoints between optimizer steps, and starts a run at the step of a checkpoint.

    `TrajectoryData` gives the Trainer only the remaining rows, so its counters of batches start at zero; only those of
    optimizer steps continue.
    """

    def __init__(
        self, folder: CheckpointFolder, config: CheckpointConfig, begin: Checkpoint | None, run: dict[str, Any]
    ) -> None:
        """
        Args:
            begin: checkpoint to resume from; None to start at step 0
            run: what the manifest will say about this run, one of those that made the branch
        """
        self.folder = folder
        self.config = config
        self.begin = begin
        self.runs = [*(begin.runs if begin else ()), {"from_step": begin.step if begin else 0, **run}]
        self._saved = begin.step if begin else 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started = self._saved_at = time.monotonic()
        if self.begin is None:
            return
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = self.begin.step
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.begin.step
        load_state(self.begin.folder, module, _optimizer(trainer))
        assert isinstance(module, Student)
        module.skipped, module.skipped_in_a_row = self.begin.skipped, self.begin.skipped_in_a_row
        (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
        scheduler.last_epoch = self.begin.step  # its learning rates came with the optimizer's state

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        """Save before the first row of a step, when the step before it has been logged."""
        if index % trainer.accumulate_grad_batches:
            return
        self._generators = generators()
        if trainer.global_step == self._saved:
            return
        assert isinstance(module, Student)
        left = module.total_steps - trainer.global_step
        if ranks.summed(self._is_due(trainer.global_step, left)) != [0]:
            self.save(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Free moments and gradients, 12 bytes a parameter, which the Trainer would else move to the CPU."""
        _optimizer(trainer).state.clear()
        module.zero_grad()

    @property
    def seconds(self) -> float:
        """Training time so far, earlier runs included."""
        return (self.begin.seconds if self.begin else 0.0) + time.monotonic() - self._started

    def _is_due(self, step: int, left: int) -> bool:
        """Whether to save now.

        Several processes also save before the last step, since one process then publishes the result for all of them
        and may fail.
        """
        every, minutes = self.config.every_n_steps, self.config.every_n_minutes
        if left == 1 and ranks.world() > 1 and self.config.is_on:
            return True
        by_step = every is not None and step - self._saved >= every
        return by_step or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def save(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the state after the last complete step.

        If some rows of the next step are done, the resumed run repeats them with the same random numbers.
        """
        assert isinstance(module, Student)
        if trainer.global_step == self._saved:
            return
        position = Position(
            step=trainer.global_step,
            seconds=self.seconds,
            skipped=module.skipped,
            skipped_in_a_row=module.skipped_in_a_row,
            runs=self.runs,
        )
        module.zero_grad()  # gradients of a step that is not complete
        optimizer, drawn = _optimizer(trainer), self._generators
        self.folder.write(position, lambda folder: save_state(folder, module, optimizer, drawn))
        self._saved, self._saved_at = trainer.global_step, time.monotonic()


class EndWhenTold(Callback):
    """Ends the training between two rows once a signal has come.

    Stands after the callbacks that run the student (validation, samples), which stop early on a signal.
    """

    def __init__(self, resume: Resume, ending: Ending) -> None:
        self.resume = resume
        self.ending = ending

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Listen for signals in place of the Trainer, from the moment at which it would begin to.

        The Trainer's own handler makes processes communicate in the middle of other communication, where they may wait
        for ever, and it ends the run with status 0.
        """
        trainer._signal_connector.register_signal_handlers = self.ending.listen  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if not self.ending.told():
            return
        self.resume.save(trainer, module)
        ranks.say(
            f"told to end after step {trainer.global_step} of {self.resume.folder.folder.name}; run the same command"
            " again to go on"
        )
        raise SystemExit(self.ending.status)


def _optimizer(trainer: Trainer) -> Optimizer:
    (optimizer,) = trainer.optimizers
    return optimizer
