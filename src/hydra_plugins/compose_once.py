"""Hydra's own sweeper, except that members of a sweep with the same config groups share one composition.

Composing takes a tenth of a second and Hydra does it twice a member, to check it and to launch it. Here each choice of
config groups is composed once, a member's values are set in a copy, and that copy is checked and launched. Hydra finds
plugins only in packages of this name.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from branchmerge.student import places


class ComposeOnceSweeper(BasicSweeper):
    """`hydra/sweeper=compose_once`; takes what `hydra/sweeper=basic` takes, but for branches of one place."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        loader = hydra_context.config_loader
        assert isinstance(loader, ConfigLoaderImpl)
        about_hydra = [str(line) for line in config.hydra.overrides.hydra]  # they may name more folders of configs
        _, self._repository = loader._parse_overrides_and_create_caching_repo(config.hydra.job.config_name, about_hydra)
        self._compose = loader.load_sweep_config
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._checked: defaultdict[tuple[str, ...], list[DictConfig]] = defaultdict(list)
        if str(config.hydra.launcher._target_).endswith("BasicLauncher"):  # others take the loader to other machines
            loader.load_sweep_config = self._take  # type: ignore[method-assign]
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        members = [self._member(overrides) for overrides in batch]
        places.check_members(members)
        for overrides, member in zip(batch, members, strict=True):
            self._checked[tuple(overrides)].append(member)

    def _take(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """What the launcher gets."""
        checked = self._checked[tuple(sweep_overrides)]
        return checked.pop() if checked else self._compose(master_config, sweep_overrides)

    def _member(self, overrides: Sequence[str]) -> DictConfig:
        """The config that Hydra would compose for these overrides."""
        assert self.config is not None
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        values = [override for override in parsed if self._sets_a_value(override)]
        choices = tuple(str(override.input_line) for override in parsed if override not in values)
        if choices not in self._composed:
            self._composed[choices] = self._compose(self.config, list(choices))
        member = copy.deepcopy(self._composed[choices])
        ConfigLoaderImpl._apply_overrides_to_config(values, member)
        _name(member, [override for override in parsed if not override.is_hydra_override()])
        return member

    def _sets_a_value(self, override: Override) -> bool:
        """Not one that chooses a config of a group, by Hydra's own rule."""
        if override.is_hydra_override():
            return False
        return isinstance(override.value(), dict) or not self._repository.group_exists(override.key_or_group)


def _name(member: DictConfig, overrides: list[Override]) -> None:
    """Tell a config which overrides it is made of."""
    job = member.hydra.job
    member.hydra.overrides.task = [override.input_line for override in overrides]
    style = OmegaConf.to_container(job.config.override_dirname)
    job.override_dirname = get_overrides_dirname(overrides=overrides, **style)  # type: ignore[arg-type]


@dataclass
class ComposeOnceSweeperConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.compose_once.ComposeOnceSweeper"


ConfigStore.instance().store(
    group="hydra/sweeper", name="compose_once", node=ComposeOnceSweeperConf, provider="branchmerge"
)
