"""Where the files of a branch lie."""

from pathlib import Path

from branchmerge.config import TrainConfig
from branchmerge.study import Study, place


def result(config: TrainConfig) -> Path:
    """The expert, or the backbone that a study makes itself."""
    if config.out is not None:
        return place(config.out)
    study = Study(config)
    return study.backbone if config.domain.name == "warmup" else study.expert(config.domain.name)


def logs(config: TrainConfig) -> Path:
    """Training curves."""
    if config.out is not None:
        return _beside(config.out, "logs")
    return Study(config).logs("train", config.domain.name)


def checkpoints(config: TrainConfig) -> Path:
    """Checkpoints while it is in training."""
    if config.out is not None:
        return _beside(config.out, "checkpoints")
    return Study(config).checkpoints


def _beside(out: str, what: str) -> Path:
    path = place(out)
    return path.parent / f"{path.name}-{what}"
