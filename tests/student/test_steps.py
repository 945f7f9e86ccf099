"""What is told of optimizer steps: those that were left out, and the time that they took."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from branches import branch, metrics
from lightning import Callback

from branchmerge.data.batch import Batch
from branchmerge.data.datamodule import PackedRows
from branchmerge.errors import UserError
from branchmerge.student import fit
from branchmerge.student.module import Student
from branchmerge.student.training import train
from branchmerge.study import read_manifest


@pytest.mark.parametrize("broken", ["gradient", "loss"])
def test_a_step_without_a_finite_loss_or_gradient_is_left_out(
    broken: str, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if that step's rows had overflowed: neither weights nor moments know of it."""
    train(branch(tiny_student, tmp_path / "whole", "domain=math"))
    usual = Student.training_step

    def overflowing(self: Student, batch: Batch, index: int) -> torch.Tensor:
        loss = self.packed.loss
        if self.trainer.global_step == 1 and broken == "loss":
            self.packed.loss = lambda model, row: loss(model, row) + float("nan")
        share = usual(self, batch, index)
        self.packed.loss = loss
        return share * float("inf") if self.trainer.global_step == 1 and broken == "gradient" else share

    monkeypatch.setattr(Student, "training_step", overflowing)
    settings = branch(tiny_student, tmp_path / "skipping", "domain=math")
    before: list[dict[str, torch.Tensor]] = []
    at_end = Student.on_train_batch_end

    def keep(self: Student, *given: Any) -> None:
        if self.trainer.global_step != self._step_before:
            before.append({name: value.clone() for name, value in self.state_dict().items()})
        at_end(self, *given)

    monkeypatch.setattr(Student, "on_train_batch_end", keep)
    train(settings)
    rows = metrics(tmp_path / "skipping", "math")
    assert [float(row["skipped_rows"]) for row in rows] == [0, float(rows[1]["rows"]), 0]
    assert float(rows[1]["rows"]) > 0 and (float(rows[1]["loss"]) != float(rows[1]["loss"])) == (broken == "loss")
    assert (float(rows[1]["grad_norm"]) < 1e9) == (broken == "loss")
    manifest = read_manifest(tmp_path / "skipping" / "tiny" / "experts" / "math")
    assert manifest is not None and manifest.training["skipped_steps"] == 1
    assert rows[0]["loss"] == metrics(tmp_path / "whole", "math")[0]["loss"]
    assert all(torch.equal(before[0][name], value) for name, value in before[1].items())
    assert any(not torch.equal(before[1][name], value) for name, value in before[2].items())
    assert "left out (1 of 3 in a row)" in capsys.readouterr().out


def test_steps_left_out_before_a_run_went_on_are_counted(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here the first, after which it is told to end, and the last, whose loss no JSON could hold."""
    usual = Student.training_step

    def overflowing(self: Student, batch: Batch, index: int) -> torch.Tensor:
        share = usual(self, batch, index)
        if self.trainer.global_step == 0:
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGTERM)
        if self.trainer.global_step in (0, 2):
            self._shares[-1] = (share.detach() * float("inf"), batch.ids)
            return share * float("inf")
        return share

    monkeypatch.setattr(Student, "training_step", overflowing)
    settings = branch(tiny_student, tmp_path, "domain=math", "optim.global_batch=1")
    with pytest.raises(SystemExit):
        train(settings)
    first = metrics(tmp_path, "math")
    manifest = read_manifest(train(settings))
    assert manifest is not None and (manifest.training["steps"], manifest.training["skipped_steps"]) == (3, 2)
    assert manifest.training["last_loss"] is None and "last loss not finite" in capsys.readouterr().out
    json.loads((tmp_path / "tiny/experts/math/manifest.json").read_text(), parse_constant=pytest.fail)
    assert len(first) == 1 and [float(row["skipped_rows"]) for row in metrics(tmp_path, "math")] == [1, 0, 1]
    seconds = sum(float(row["tokens"]) / float(row["tokens_per_second"]) for row in metrics(tmp_path, "math"))
    assert manifest.training["seconds"] > seconds  # of both runs


def test_a_branch_that_stopped_stops_again(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in a row are counted over the runs that did them; else each run would get a few steps further."""
    usual = Student.training_step

    def overflowing(self: Student, batch: Batch, index: int) -> torch.Tensor:
        return usual(self, batch, index) * (float("inf") if self.trainer.global_step >= 2 else 1.0)

    monkeypatch.setattr(Student, "training_step", overflowing)
    long = ("optim.epochs=20", "optim.max_steps=20", "trainer.checkpoint.every_n_steps=1")
    for allowed, last in ((2, 4), (2, 4), (3, 5)):
        with pytest.raises(UserError, match=rf"^step {last}: .* on the rows"):
            train(branch(tiny_student, tmp_path, "domain=math", *long, f"trainer.max_skipped_steps={allowed}"))


def test_waiting_for_rows_takes_time_and_looking_at_the_student_none(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the curve's tokens a second, which MFU is made of."""
    usual = PackedRows.__getitem__

    def slow(self: PackedRows, index: int) -> Batch:
        time.sleep(0.4)
        return usual(self, index)

    class Looking(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            time.sleep(3)

    monkeypatch.setattr(PackedRows, "__getitem__", slow)
    monkeypatch.setattr(fit, "watchers", lambda *_: [Looking()])
    train(branch(tiny_student, tmp_path, "domain=math", "optim.global_batch=1"))
    rows = metrics(tmp_path, "math")[1:]  # workers are started for the first
    seconds = [float(row["tokens"]) / float(row["tokens_per_second"]) for row in rows]
    assert all(0.4 <= each < 3 for each in seconds), seconds


@pytest.mark.parametrize(("rows", "most", "empty"), [(6, 2, 2), (1, 1, 3), (8, 2, 0)])
def test_devices_that_will_have_no_row_are_told_beforehand(
    rows: int, most: int, empty: int, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = branch(tiny_student, tmp_path, "domain=math", f"optim.global_batch={rows}")
    assert fit._rows_of_each(config, 4) == most
    said = capsys.readouterr().out
    assert (f"so {empty} of {most * 4} places stay empty" in said) if empty else not said
