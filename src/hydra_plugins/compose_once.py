"""Hydra's own sweeper, but each member is composed once: what was composed to be checked is what is launched.

Composing takes a tenth of a second and Hydra does it twice a member, which a sweep of merges would notice. Hydra finds
its plugins in packages of this name only.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ComposeOnceSweeper(BasicSweeper):
    """`hydra/sweeper=compose_once`; takes what `hydra/sweeper=basic` takes."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        loader = hydra_context.config_loader
        self._compose = loader.load_sweep_config
        self._checked: defaultdict[tuple[str, ...], list[DictConfig]] = defaultdict(list)
        loader.load_sweep_config = self._take  # type: ignore[method-assign]
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.config is not None
        for overrides in batch:
            self._checked[tuple(overrides)].append(self._compose(self.config, list(overrides)))

    def _take(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """What the launcher gets."""
        checked = self._checked[tuple(sweep_overrides)]
        return checked.pop() if checked else self._compose(master_config, sweep_overrides)


@dataclass
class ComposeOnceSweeperConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.compose_once.ComposeOnceSweeper"


ConfigStore.instance().store(
    group="hydra/sweeper", name="compose_once", node=ComposeOnceSweeperConf, provider="branchmerge"
)
