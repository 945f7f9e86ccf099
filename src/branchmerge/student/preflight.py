"""Check a branch before its processes are started, or minutes are spent on its backbone."""

from typing import Any

from branchmerge import machine
from branchmerge.config import TrainConfig
from branchmerge.config_checks import check_packages
from branchmerge.data import held_out
from branchmerge.files import writing
from branchmerge.student import backbone, places
from branchmerge.study import check_free
from branchmerge.trajectories.sources import read_branch


def check_branch(config: TrainConfig) -> None:
    """Raise UserError for mistakes that can be found without the backbone's weights; reads all rows of the branch."""
    check_packages(config)
    folder = places.result(config)
    with writing(folder):
        check_free(folder)
    shape = backbone.shape_of(config, backbone.find(config))
    if shape:
        check_shape(config, shape)
    held_out.check_count(config, read_branch(config))
    machine.give_back_memory()  # the rows', as this process may wait for a whole training


def check_shape(config: TrainConfig, shape: dict[str, Any]) -> None:
    """Refuse a model whose config.json does not fit the settings of the training."""
    backbone.check_heads(shape, config.trainer.context_parallel)
    backbone.check_rows(shape, config.data.seq_len)
