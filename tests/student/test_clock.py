"""When a branch in training is saved."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from branches import branch
from test_resume import SETTINGS, folder_with

from branchmerge.config import CheckpointConfig
from branchmerge.data.batch import Batch
from branchmerge.student import resume
from branchmerge.student.checkpoints import CheckpointFolder, Position
from branchmerge.student.module import Student
from branchmerge.student.resume import Resume
from branchmerge.student.training import train


@pytest.mark.parametrize(("minutes", "expected"), [("1e-9", [1, 2]), ("1000", [])])
def test_checkpoints_come_by_the_clock(
    minutes: str, expected: list[int], tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    usual = CheckpointFolder.write

    def write(self: CheckpointFolder, position: Position, save: Callable[[Path], None]) -> bool:
        written.append(position.step)
        return usual(self, position, save)

    monkeypatch.setattr(CheckpointFolder, "write", write)
    clock = ("trainer.checkpoint.every_n_steps=null", f"trainer.checkpoint.every_n_minutes={minutes}")
    train(branch(tiny_student, tmp_path, *SETTINGS, "optim.max_steps=3", *clock))
    assert written == expected


def test_ten_minutes_are_ten_minutes(tmp_path: Path) -> None:
    """Also beside a number of steps."""
    saving = Resume(folder_with(tmp_path), CheckpointConfig(every_n_minutes=10, every_n_steps=1000), None, {})
    for seconds, due in ((599, False), (601, True)):
        saving._saved_at = time.monotonic() - seconds
        assert saving._is_due(step=5, left=9) is due


def test_the_next_ten_minutes_begin_with_a_checkpoint(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the 20 steps takes four by the clock."""
    now, saved = [0.0], []
    usual_step, usual_save = Student.training_step, resume.save_state

    def step(self: Student, batch: Batch, index: int) -> torch.Tensor:
        now[0] = 240.0 * (self.trainer.global_step + 1)
        return usual_step(self, batch, index)

    def save(folder: Path, *given: Any) -> None:
        saved.append(int(folder.name.split("-")[1].split(".")[0]))
        usual_save(folder, *given)

    monkeypatch.setattr(Student, "training_step", step)
    monkeypatch.setattr(resume, "save_state", save)
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: now[0]))
    train(branch(tiny_student, tmp_path, *SETTINGS, "trainer.checkpoint.every_n_steps=null"))
    assert saved == [3, 6, 9, 12, 15, 18]
