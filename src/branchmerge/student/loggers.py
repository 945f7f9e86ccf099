"""Training curves: a CSV file always, W&B, TensorBoard or MLflow beside it on request."""

import csv
import netrc
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger

from branchmerge.config import TrainConfig
from branchmerge.student import ranks
from branchmerge.student.samples import SAMPLES
from branchmerge.study import UNWRITABLE, write_text

METRICS = "metrics.csv"
RUN_ID = "wandb-run.txt"
WORK = "work.txt"
TOLD = (METRICS, RUN_ID, SAMPLES)
"""What a run that goes on reads"""


@contextmanager
def loggers_of(config: TrainConfig, folder: Path, first_step: int = 0) -> Iterator[list[Logger]]:
    """The loggers of a branch, while it trains; the CSV file is `<folder>/metrics.csv`.

    Args:
        first_step: where this run goes on; what an earlier one told of the steps before stays.
    """
    failed = True
    try:
        yield _make(config, folder, first_step)
        failed = False
    finally:
        if config.logger.kind == "wandb":
            import wandb

            wandb.finish(exit_code=int(failed))  # else the next branch of this process would go into the same run


def claim(folder: Path, work: str) -> None:
    """Make a folder of logs that of a work; what runs of another told there goes, so that none goes on with it."""
    mark = folder / WORK
    if mark.is_file() and mark.read_text() != work:
        for name in TOLD:
            (folder / name).unlink(missing_ok=True)
    write_text(mark, work)


def _make(config: TrainConfig, folder: Path, first_step: int) -> list[Logger]:
    kept = _rows_before(folder / METRICS, first_step)
    (folder / METRICS).unlink(missing_ok=True)
    curve = _Curve(folder, name="", version="", flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # other logs lie there too, and stay
        _ = curve.experiment
    for row in kept:
        curve.log_metrics({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
    loggers: list[Logger] = [curve]
    if config.logger.kind == "wandb":
        loggers.append(_wandb(config, folder, first_step))
    elif config.logger.kind == "tensorboard":
        loggers.append(_tensorboard(folder))
    elif config.logger.kind == "mlflow":
        loggers.append(_mlflow(config, folder))
    return loggers


class _Curve(CSVLogger):
    """A full disk does not end a training: the rows wait in memory until there is room."""

    _told = False

    def save(self) -> None:
        path = Path(self.log_dir) / METRICS
        size = path.stat().st_size if path.is_file() else 0
        try:
            super().save()
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            if path.is_file():
                os.truncate(path, size)  # no half of a row
            if not self._told:
                ranks.say(f"warning: {path}: cannot be written ({error.strerror}); training goes on")
            self._told = True


def _rows_before(path: Path, step: int) -> list[dict[str, float]]:
    """Of a curve; a line that was cut off is left out, and a damaged curve begins anew."""
    if not path.is_file():
        return []
    try:
        whole = path.read_text()
        rows = csv.DictReader(whole[: whole.rfind("\n") + 1].splitlines())
        # Validation has rows of its own, which leave the columns of training empty, and the other way round.
        kept = [{name: float(value) for name, value in row.items() if value} for row in rows]
        return [row for row in kept if row["step"] < step]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        ranks.say(f"warning: {path}: damaged ({error}); the curve begins anew")
        return []


def _wandb(config: TrainConfig, folder: Path, first_step: int) -> Logger:
    """W&B, offline without a key, so that it never asks, and where it cannot be reached.

    `wandb sync` uploads an offline run later. A training that goes on does so in the same run.
    """
    from wandb.errors import Error as WandbError

    kept = folder / RUN_ID
    run = kept.read_text() if first_step and kept.is_file() else secrets.token_hex(4)
    write_text(kept, run)
    if not os.environ.get("WANDB_MODE", "offline"):
        del os.environ["WANDB_MODE"]  # W&B takes no empty one
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    try:
        return _wandb_run(config, folder, run, mode)
    except WandbError as error:
        said = " ".join(str(error).split())
        ranks.say(f"warning: W&B: {said}; the curve is kept in {folder}/wandb, for wandb sync to upload later")
        run = secrets.token_hex(4)  # the other one is taken by what failed
        write_text(kept, run)
        return _wandb_run(config, folder, run, "offline")


def _wandb_run(config: TrainConfig, folder: Path, run: str, mode: str) -> Logger:
    """Begun at once, so that what is wrong with it is seen."""
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(
        project=config.logger.project,
        entity=config.logger.entity,
        name=f"{config.study.name}-{config.domain.name}",
        version=run,
        save_dir=folder,
        mode=mode,  # and no `offline=`, which Lightning puts into the environment for all that comes after
    )
    _ = logger.experiment  # which begins it
    return logger


def _has_wandb_key() -> bool:
    """Whether W&B could log in without asking: a key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def _tensorboard(folder: Path) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(folder, name="", version="tensorboard")


def _mlflow(config: TrainConfig, folder: Path) -> Logger:
    """MLflow: to a server where one is named, else into `<folder>/mlflow.db`, which `mlflow ui` reads."""
    from lightning.pytorch.loggers import MLFlowLogger

    folder.mkdir(parents=True, exist_ok=True)
    server = config.logger.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return MLFlowLogger(
        config.study.name,
        run_name=config.domain.name,
        tracking_uri=server or f"sqlite:///{folder}/mlflow.db",
        artifact_location=None if server else str(folder / "mlflow"),
    )
