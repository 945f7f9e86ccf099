"""The curve outlives kills, damage and full disks; what else is told of a branch ends none."""

import csv
import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from branches import branch, metrics
from lightning import Callback
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger

from branchmerge.data.template import Document
from branchmerge.errors import UserError
from branchmerge.student import fit, loggers
from branchmerge.student.backbone import load_tokenizer
from branchmerge.student.ending import Ending
from branchmerge.student.loggers import KEPT, METRICS, RUN_ID, WORK, claim, loggers_of
from branchmerge.student.samples import Samples
from branchmerge.student.training import train


def test_a_damaged_curve_begins_anew(tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / METRICS).write_text("step,loss\n0,1.5\n1,\0garbage\n")
    with loggers_of(branch(tiny_student, tmp_path, "domain=math"), tmp_path, 5) as (curve,):
        curve.log_metrics({"loss": 2.0}, 5)
    assert "damaged" in capsys.readouterr().out
    assert [line.split(",")[0] for line in (tmp_path / METRICS).read_text().splitlines()[1:]] in (["2.0"], ["5"])


def test_a_curve_outlives_a_kill_while_it_is_taken_over(tiny_student: Path, tmp_path: Path) -> None:
    """Killed by itself where Lightning's writer has removed the curve, and no row is back yet."""
    settings = branch(tiny_student, tmp_path, "domain=math")
    with loggers_of(settings, tmp_path) as (curve,):
        for step in range(4):
            curve.log_metrics({"loss": 1 / 3 + step, "lr": 1e-4}, step)
        curve.log_metrics({"validation": 2.0}, 3)
        curve.save()
    before = (tmp_path / METRICS).read_text().splitlines()
    usual = _ExperimentWriter.__init__

    def killed(writer: _ExperimentWriter, log_dir: str) -> None:
        usual(writer, log_dir)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        with suppress(BaseException):
            _ExperimentWriter.__init__ = killed  # type: ignore[method-assign]
            loggers_of(settings, tmp_path, 3).__enter__()
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / METRICS).exists()
    with loggers_of(settings, tmp_path, 3) as (curve,):
        curve.log_metrics({"loss": 9.0, "grad_norm": 1.0}, 3)
        curve.save()
    rows = list(csv.DictReader((tmp_path / METRICS).open()))
    assert [row["loss"] for row in rows] == [*(row.split(",")[0] for row in before[1:4]), "9.0"]
    assert not (tmp_path / KEPT).exists()


@contextmanager
def files_of(size: int) -> Iterator[None]:
    """No file may grow beyond that many bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_from_the_first_row_on_costs_no_header(tiny_student: Path, tmp_path: Path) -> None:
    with loggers_of(branch(tiny_student, tmp_path, "domain=math"), tmp_path) as (curve,):
        for step, size in enumerate((0, 4, 1 << 20)):
            with files_of(size):
                curve.log_metrics({"loss": 1.0}, step)
                curve.save()
    with (tmp_path / METRICS).open() as lines:
        assert [row["step"] for row in csv.DictReader(lines)] == ["0", "1", "2"]


def test_a_full_disk_costs_the_sample_and_not_the_next_one(tiny_student: Path, tmp_path: Path) -> None:
    samples = Samples(load_tokenizer(tiny_student), Document("a", np.arange(3), 1), 1, 4, tmp_path, Ending())
    for step, size in ((0, 1 << 20), (1, 20), (2, 1 << 20)):
        with files_of(size):
            samples._add({"step": step})
    assert [json.loads(line) for line in samples.path.read_text().splitlines()] == [{"step": 0}, {"step": 2}]


def test_a_disk_that_may_not_be_written_any_more_ends_no_training(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk in memory")
    try:
        samples = Samples(load_tokenizer(tiny_student), Document("a", np.arange(3), 1), 1, 4, tmp_path, Ending())
        with loggers_of(branch(tiny_student, tmp_path, "domain=math"), tmp_path) as (curve,):
            for step in range(2):
                curve.log_metrics({"loss": 1.0}, step)
                curve.save()
                samples._add({"step": step})
                subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        assert capsys.readouterr().out.count("cannot be written (Read-only file system); training goes on") == 2
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_what_killed_runs_left_half_written_goes(tmp_path: Path) -> None:
    (tmp_path / f".{METRICS}.partial-1").write_text("loss,st")
    claim(tmp_path, "work")
    assert [path.name for path in tmp_path.iterdir()] == [WORK]


def test_a_run_that_goes_on_takes_over_no_curve_of_another(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InSecondStep(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("as if killed")

    usual = fit.watchers
    every = ("domain=math", "trainer.checkpoint.every_n_steps=1")
    for rate in ("1e-4", "2e-3"):
        with monkeypatch.context() as killed, pytest.raises(RuntimeError, match="as if killed"):
            killed.setattr(fit, "watchers", lambda *given: [*usual(*given), InSecondStep()])
            train(branch(tiny_student, tmp_path, *every, f"optim.lr={rate}"))
    train(branch(tiny_student, tmp_path, *every, "optim.lr=1e-4"))
    curve = metrics(tmp_path, "math")
    assert curve and all(float(row["lr"]) <= 1e-4 for row in curve)


def test_branches_of_one_process_have_wandb_runs_of_their_own_and_go_on_in_them(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for domain in ("math", "code"):
        train(branch(tiny_student, tmp_path, f"domain={domain}", "logger=wandb", "optim.max_steps=1"))
        logs = tmp_path / "tiny" / "logs" / "train" / domain
        (run,) = logs.glob("wandb/offline-run-*/*.wandb")
        assert run.name == f"run-{(logs / RUN_ID).read_text()}.wandb"
    ids = []
    for first_step in (0, 2, 0):
        with loggers_of(branch(tiny_student, tmp_path, "domain=math", "logger=wandb"), logs, first_step):
            ids.append((logs / RUN_ID).read_text())
    assert ids[0] == ids[1] != ids[2]


def test_a_tracker_that_failed_is_left_alone_for_a_while_but_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    class Away(CSVLogger):
        """A tracker whose server is away."""

        def log_metrics(self, *_: Any, **__: Any) -> None:
            asked.append("log")
            raise ConnectionError("no route")

        def finalize(self, status: str) -> None:
            asked.append(status)

    monkeypatch.setattr(loggers, "PAUSE", 0.2)
    tracker = loggers._lenient(Away(tmp_path))
    tracker.log_metrics({})
    tracker.log_metrics({})
    assert asked == ["log"]
    time.sleep(0.3)
    tracker.log_metrics({})
    tracker.finalize("success")
    assert asked == ["log", "log", "success"]
    assert capsys.readouterr().out.count("warning: Away: ConnectionError: no route; training goes on") == 1


def test_a_tracker_that_cannot_be_begun_ends_only_a_run_that_begins(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("no folder")
    settings = branch(tiny_student, tmp_path, "domain=math", "logger=tensorboard")
    with pytest.raises(UserError, match="logger=tensorboard: cannot be begun"), loggers_of(settings, tmp_path):
        pass
    with loggers_of(settings, tmp_path, 3) as found:
        assert len(found) == 1
    assert "training goes on without it" in capsys.readouterr().out


def test_tensorboard_shows_a_step_once(tiny_student: Path, tmp_path: Path) -> None:
    """A run that goes on does some again; one that begins has nothing to do with what was told there before."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = branch(tiny_student, tmp_path, "domain=math", "logger=tensorboard")
    for first_step, loss, shown in [(0, 1, [1] * 4), (2, 2, [1, 1, 2, 2]), (0, 3, [3] * 4)]:
        with loggers_of(settings, tmp_path, first_step) as (_, tracker):
            for step in range(first_step, 4):
                tracker.log_metrics({"loss": loss}, step)
            tracker.finalize("success")
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(shown))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_a_tracker_that_fails_ends_no_training(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard where no file may grow beyond 4 kB, as on a full disk, and again when there is room."""
    monkeypatch.setattr(loggers, "PAUSE", 0.0)
    settings = branch(tiny_student, tmp_path, "domain=math", "logger=tensorboard")
    with loggers_of(settings, tmp_path) as (curve, tracker):
        with files_of(4096):
            for step in range(200):
                tracker.log_metrics({"loss": 1.0}, step)
                tracker.save()
        curve.log_metrics({"loss": 1.0}, 200)
        tracker.finalize("success")
    said = capsys.readouterr().out
    assert said.count("warning: TensorBoardLogger: OSError: ") == 1 and "training goes on" in said
