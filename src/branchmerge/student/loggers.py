"""Training curves: a CSV file always, W&B, TensorBoard or MLflow beside it on request."""

import csv
import netrc
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger

from branchmerge.config import TrainConfig
from branchmerge.student import ranks
from branchmerge.study import UNWRITABLE

METRICS = "metrics.csv"


def make_loggers(config: TrainConfig, folder: Path, first_step: int = 0) -> list[Logger]:
    """The loggers of a branch; the CSV file is `<folder>/metrics.csv`.

    Args:
        first_step: where this run goes on; what an earlier one told of the steps before stays.
    """
    kept = _rows_before(folder / METRICS, first_step)
    (folder / METRICS).unlink(missing_ok=True)
    curve = _Curve(folder, name="", version="", flush_logs_every_n_steps=1)
    for row in kept:
        curve.log_metrics({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
    loggers: list[Logger] = [curve]
    if config.logger.kind == "wandb":
        loggers.append(_wandb(config, folder))
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
    """Of a curve; a line that was cut off is left out."""
    if not path.is_file():
        return []
    whole = path.read_text()
    rows = csv.DictReader(whole[: whole.rfind("\n") + 1].splitlines())
    # Validation has rows of its own, which leave the columns of training empty, and the other way round.
    kept = [{name: float(value) for name, value in row.items() if value} for row in rows]
    return [row for row in kept if row["step"] < step]


def _wandb(config: TrainConfig, folder: Path) -> Logger:
    """W&B, offline without a key, so that it never asks, and where it cannot be reached.

    `wandb sync` uploads an offline run later.
    """
    from wandb.errors import Error as WandbError

    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _wandb_run(config, folder, mode)
    except WandbError as error:
        said = " ".join(str(error).split())
        ranks.say(f"warning: W&B: {said}; the curve is kept in {folder}/wandb, for wandb sync to upload later")
        return _wandb_run(config, folder, "offline")


def _wandb_run(config: TrainConfig, folder: Path, mode: str) -> Logger:
    """Begun at once, so that what is wrong with it is seen."""
    from lightning.pytorch.loggers import WandbLogger

    os.environ["WANDB_MODE"] = mode
    logger = WandbLogger(
        project=config.logger.project,
        entity=config.logger.entity,
        name=f"{config.study.name}-{config.domain.name}",
        save_dir=folder,
        offline=mode == "offline",
        mode=mode,  # told, as W&B does not look into the environment again
    )
    assert logger.experiment is not None
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
