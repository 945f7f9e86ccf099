"""The curve outlives kills, damage and full disks; what else is told of a branch ends none."""

import csv
import os
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from branches import branch, metrics
from lightning import Callback
from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger

from branchmerge.errors import UserError
from branchmerge.student import loggers, training
from branchmerge.student.loggers import KEPT, METRICS, RUN_ID, loggers_of
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


def test_a_run_that_goes_on_takes_over_no_curve_of_another(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InSecondStep(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("as if killed")

    usual = training.watchers
    every = ("domain=math", "trainer.checkpoint.every_n_steps=1")
    for rate in ("1e-4", "2e-3"):
        with monkeypatch.context() as killed, pytest.raises(RuntimeError, match="as if killed"):
            killed.setattr(training, "watchers", lambda *given: [*usual(*given), InSecondStep()])
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own
def test_a_tracker_that_fails_ends_no_training(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard where no file may grow beyond 4 kB, as on a full disk, and again when there is room."""
    monkeypatch.setattr(loggers, "PAUSE", 0.0)
    settings = branch(tiny_student, tmp_path, "domain=math", "logger=tensorboard")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with loggers_of(settings, tmp_path) as (curve, tracker):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            for step in range(200):
                tracker.log_metrics({"loss": 1.0}, step)
                tracker.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        curve.log_metrics({"loss": 1.0}, 200)
        tracker.finalize("success")
    said = capsys.readouterr().out
    assert said.count("warning: TensorBoardLogger: OSError: ") == 1 and "training goes on" in said
