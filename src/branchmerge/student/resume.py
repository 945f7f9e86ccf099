"""Save a branch as it trains, stop it when the machine is taken away, and go on from where it was."""

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
    """Writes checkpoints of whole optimizer steps, and starts a run at the step of one.

    The Trainer is handed the rows that are left (`TrajectoryData`), so its own counters of batches begin anew; only
    those of optimizer steps go on.
    """

    def __init__(
        self, folder: CheckpointFolder, config: CheckpointConfig, begin: Checkpoint | None, run: dict[str, Any]
    ) -> None:
        """`run`: what the manifest tells of this run, one of those that made the branch."""
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
        """Between steps: the one before has been logged."""
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
        """What only a further step needs goes, as the Trainer would move it to the CPU, 12 bytes a parameter."""
        _optimizer(trainer).state.clear()
        module.zero_grad()

    @property
    def seconds(self) -> float:
        """Of training so far, those of earlier runs included."""
        return (self.begin.seconds if self.begin else 0.0) + time.monotonic() - self._started

    def _is_due(self, step: int, left: int) -> bool:
        """Of several processes also before the last step, as publishing is then the work of one for all."""
        every, minutes = self.config.every_n_steps, self.config.every_n_minutes
        if left == 1 and ranks.world() > 1 and self.config.is_on:
            return True
        by_step = every is not None and step - self._saved >= every
        return by_step or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def save(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last whole step; where the next one has begun, it is begun anew with the same generators."""
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
        module.zero_grad()  # of the rows of a step that is not done
        optimizer, drawn = _optimizer(trainer), self._generators
        self.folder.write(position, lambda folder: save_state(folder, module, optimizer, drawn))
        self._saved, self._saved_at = trainer.global_step, time.monotonic()


class EndWhenTold(Callback):
    """After the callbacks that look at the student: they leave off what they do, and not even a row is waited for."""

    def __init__(self, resume: Resume, ending: Ending) -> None:
        self.resume = resume
        self.ending = ending

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Listen where the Trainer would begin to, and so through all of its work, from the loading of a checkpoint on.

        Its own handler has processes meet in the middle of what they do together, where they may wait for ever, and
        ends the run with status 0.
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
