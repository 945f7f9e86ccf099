"""Locations of the files of a branch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from branchmerge.config import TrainConfig
from branchmerge.errors import UserError
from branchmerge.study import Study, place


def result(config: TrainConfig) -> Path:
    """Folder of the expert, or of the backbone that the study's warm-up makes."""
    if config.out is not None:
        return place(config.out)
    study = Study(config)
    return study.backbone if config.domain.name == "warmup" else study.expert(config.domain.name)


def logs(config: TrainConfig) -> Path:
    """Folder of the training curves."""
    if config.out is not None:
        return _beside(config.out, "logs")
    return Study(config).logs("train", config.domain.name)


def checkpoints(config: TrainConfig) -> Path:
    """Folder of the checkpoints of a branch in training."""
    if config.out is not None:
        return _beside(config.out, "checkpoints")
    return Study(config).checkpoints


def check_members(members: Sequence[DictConfig]) -> None:
    """Refuse a multirun in which two branches would write the same result; otherwise the second would fail late."""
    made: dict[Path, list[str]] = {}
    for member in members:
        branch: Any = member  # composed, not yet typed
        try:
            if "domain" not in branch or branch.plan or branch.redo:
                continue
            folder = result(branch)
        except OmegaConfBaseException:  # missing values are reported when this member is run
            continue
        said = [str(override) for override in branch.hydra.overrides.task]
        if folder in made:
            pairs = (made[folder], said), (said, made[folder])
            one, other = (" ".join(o for o in mine if o not in theirs) or "the same" for mine, theirs in pairs)
            raise UserError(
                f"{folder}: would be made twice, with {one} and with {other}; put what differs into out=, such as"
                " 'out=runs/${domain.name}-lr${optim.lr}'"
            )
        made[folder] = said


def _beside(out: str, what: str) -> Path:
    path = place(out)
    return path.parent / f"{path.name}-{what}"
