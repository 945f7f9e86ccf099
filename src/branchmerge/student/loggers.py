"""Training curves: a CSV file always, W&B or TensorBoard beside it on request."""

import netrc
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger

from branchmerge.config import TrainConfig
from branchmerge.errors import UserError


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """The loggers of a branch; the CSV file is `<folder>/metrics.csv`, in place of one of an earlier try."""
    (folder / "metrics.csv").unlink(missing_ok=True)
    loggers: list[Logger] = [CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)]
    if config.logger.kind == "wandb":
        loggers.append(_wandb(config, folder))
    elif config.logger.kind == "tensorboard":
        loggers.append(_tensorboard(folder))
    return loggers


def _wandb(config: TrainConfig, folder: Path) -> Logger:
    """W&B, offline unless there is a key, so that it never asks; `wandb sync` uploads an offline run later."""
    from lightning.pytorch.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    os.environ["WANDB_MODE"] = mode
    folder.mkdir(parents=True, exist_ok=True)
    return WandbLogger(
        project=config.logger.project,
        entity=config.logger.entity,
        name=f"{config.study.name}-{config.domain.name}",
        save_dir=folder,
        offline=mode == "offline",
    )


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

    try:
        return TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError as error:
        raise UserError(
            "logger=tensorboard: tensorboard is not installed; pip install 'branchmerge[tensorboard]'"
        ) from error
