"""debug=fast and debug=overfit, run as they are on a tiny student; and the MLflow logger."""

import importlib.util
from pathlib import Path

import pytest
from branches import PROJECT, branch, metrics

from branchmerge.data.datamodule import prepare
from branchmerge.errors import UserError
from branchmerge.student.backbone import load_tokenizer
from branchmerge.student.loggers import MLFLOW_RUN_ID, loggers_of
from branchmerge.student.training import train
from branchmerge.study import Study, read_manifest
from branchmerge.trajectories.sources import read_branch

HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None


def losses(out: Path) -> list[float]:
    text = (out.parent / f"{out.name}-logs" / "metrics.csv").read_text().splitlines()
    place = text[0].split(",").index("loss")
    return [float(line.split(",")[place]) for line in text[1:]]


def test_fast_is_two_steps_away_from_the_experts_and_runs_each_time(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = branch(tiny_student, tmp_path, "domain=math", "debug=fast")
    for _ in range(2):
        folder = train(settings)
        assert "2 steps" in capsys.readouterr().out
    assert folder == tmp_path / "tiny" / "debug" / "math"
    assert len(losses(folder)) == 2
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.data["sources"]["math"]["read"] == 16
    assert not Study(settings).expert("math").exists() and not list(tmp_path.rglob("step-*"))
    assert not (tmp_path / "tiny" / "backbone").exists()


def test_overfit_learns_one_row_by_heart(tiny_student: Path, tmp_path: Path) -> None:
    settings = branch(tiny_student, tmp_path, "domain=code", "debug=overfit", "optim.lr=0.01")
    corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    rows = corpus.plan.rows
    assert len(rows) == 30 and {tuple(sorted(row)) for row in rows} == {tuple(range(len(corpus.documents)))}
    curve = losses(train(settings))
    assert len(curve) == 30 and curve[-1] < curve[0] / 4


@pytest.mark.parametrize("debug", ["fast", "overfit"])
def test_the_command_line_outranks_a_debug_config(tiny_student: Path, tmp_path: Path, debug: str) -> None:
    settings = branch(tiny_student, tmp_path, "domain=math", f"debug={debug}", "optim.max_steps=7", "out=/elsewhere")
    assert (settings.optim.max_steps, settings.out) == (7, "/elsewhere")


def test_tensorboard_gets_the_curve(tiny_student: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(branch(tiny_student, tmp_path, "domain=math", "logger=tensorboard", "data.validation_rows=2"))
    events = EventAccumulator(str(tmp_path / "tiny" / "logs" / "train" / "math" / "tensorboard"))
    events.Reload()
    losses = [float(row["loss"]) for row in metrics(tmp_path, "math") if row["loss"]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert {"lr", "grad_norm", "val_loss/code"} <= set(events.Tags()["scalars"])


@pytest.mark.skipif(HAS_MLFLOW, reason="mlflow is installed")
def test_mlflow_that_is_missing_is_one_line(tiny_student: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logger=mlflow: mlflow is not installed; pip install 'branchmerge\[mlflow\]'"):
        train(branch(tiny_student, tmp_path, "domain=math", "logger=mlflow"))


@pytest.mark.skipif(not HAS_MLFLOW, reason="needs mlflow")
def test_mlflow_gets_the_curve_without_a_server(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    train(branch(tiny_student, tmp_path, "domain=math", "logger=mlflow", "data.validation_rows=2"))
    client = MlflowClient(f"sqlite:///{tmp_path}/tiny/logs/train/math/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "math"
    history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    rows = [row for row in metrics(tmp_path, "math") if row["loss"]]
    assert history == [(int(row["step"]), pytest.approx(float(row["loss"]))) for row in rows]
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val_loss/code")] == [0, 3]


@pytest.mark.skipif(not HAS_MLFLOW, reason="needs mlflow")
def test_mlflow_has_one_run_for_a_branch_that_goes_on(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = branch(tiny_student, tmp_path, "domain=math", "logger=mlflow")
    for first_step in (0, 2, 0):
        with loggers_of(settings, tmp_path, first_step) as (_, tracker):
            tracker.log_metrics({"loss": 1.0}, first_step)
            tracker.finalize("success")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name(settings.study.name)
    assert experiment is not None
    runs = [run.info.run_id for run in client.search_runs([experiment.experiment_id], order_by=["start_time"])]
    steps = [[point.step for point in client.get_metric_history(run, "loss")] for run in runs]
    assert steps == [[0, 2], [0]]
    assert (tmp_path / MLFLOW_RUN_ID).read_text() == f"{runs[1]} sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.skipif(not HAS_MLFLOW, reason="needs mlflow")
def test_a_branch_that_goes_on_at_another_mlflow_server_has_a_run_there(tiny_student: Path, tmp_path: Path) -> None:
    """No server knows the runs of another one."""
    from mlflow.tracking import MlflowClient

    servers = [f"sqlite:///{tmp_path}/{name}.db" for name in ("one", "two")]
    for first_step, server in [(0, servers[0]), (2, servers[1]), (3, servers[1])]:
        settings = branch(tiny_student, tmp_path, "domain=math", "logger=mlflow", f"logger.tracking_uri={server}")
        with loggers_of(settings, tmp_path / "logs", first_step) as (_, tracker):
            tracker.log_metrics({"loss": 1.0}, first_step)
            tracker.finalize("success")
    found = []
    for client in map(MlflowClient, servers):
        experiment = client.get_experiment_by_name(settings.study.name)
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        found.append([point.step for point in client.get_metric_history(run.info.run_id, "loss")])
    assert found == [[0], [2, 3]]


def test_the_demo_composes_with_both(tmp_path: Path) -> None:
    for debug in ("fast", "overfit"):
        settings = branch(tmp_path, tmp_path, "study=demo", "domain=science", f"debug={debug}")
        assert settings.out == f"{tmp_path}/demo/debug/science" and not settings.study.warmup
    assert (PROJECT / "conf" / "debug").is_dir()
