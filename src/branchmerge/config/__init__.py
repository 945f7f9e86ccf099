"""Schemas of the three commands: every key there is, its type, its unit. The values stand in conf/.

    commands.py      the keys of train.py, merge.py and evaluate.py
    study.py         corpus, budget, domains and backbone
    training.py      data, optimizer, checkpoints, machine, plan, loggers
    evaluation.py    benchmark and backend

The schemas are registered with Hydra, so an unknown key or a value of the wrong type is refused while the command line
is read. What types cannot express is checked by config_checks.py.
"""

from hydra.core.config_store import ConfigStore

from branchmerge.config.commands import CommonConfig, EvaluateConfig, MergeConfig, TrainConfig
from branchmerge.config.evaluation import BackendConfig, BenchmarkConfig
from branchmerge.config.paths import PROJECT, project_path
from branchmerge.config.study import (
    BackboneConfig,
    BudgetConfig,
    DomainConfig,
    ExpectedConfig,
    SourceConfig,
    StudyConfig,
)
from branchmerge.config.training import (
    CheckpointConfig,
    DataConfig,
    LoggerConfig,
    OptimConfig,
    PlanningConfig,
    TrainerConfig,
)

__all__ = [
    "PROJECT",
    "BackboneConfig",
    "BackendConfig",
    "BenchmarkConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "CommonConfig",
    "DataConfig",
    "DomainConfig",
    "EvaluateConfig",
    "ExpectedConfig",
    "LoggerConfig",
    "MergeConfig",
    "OptimConfig",
    "PlanningConfig",
    "SourceConfig",
    "StudyConfig",
    "TrainConfig",
    "TrainerConfig",
    "project_path",
    "register",
]


def register() -> None:
    """Make the schemas known to Hydra; called once, before `hydra.main` runs."""
    store = ConfigStore.instance()
    for name, schema in (("train", TrainConfig), ("merge", MergeConfig), ("evaluate", EvaluateConfig)):
        store.store(name=f"{name}_schema", node=schema)
