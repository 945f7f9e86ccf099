"""From a composed configuration to a typed one: what types cannot express is refused here, before any work begins."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from branchmerge.config import CommonConfig, DataConfig, OptimConfig, TrainConfig, TrainerConfig
from branchmerge.errors import UserError

Schema = TypeVar("Schema", bound=CommonConfig)
WRONG_PRECISIONS = {
    "bf16-true": "weights kept in bfloat16 stand still under small updates, and rotary positions are rounded",
    "bf16": "weights kept in bfloat16 stand still under small updates, and rotary positions are rounded",
    "16-true": "weights kept in float16 stand still under small updates",
    "16-mixed": "gradients overflow float16 without a loss scale, which no step here has",
    "transformer-engine": "its float8 weights are not tested here",
}
"""Precisions that Lightning accepts and trains with, without an error but wrongly, and why."""
PACKAGES = {
    "logger=tensorboard": ("tensorboard", "tensorboard"),
    "logger=mlflow": ("mlflow", "mlflow"),
    "optim.optimizer=adamw_8bit": ("torchao", "adamw-8bit"),
}
"""Setting -> the package it needs, and the extra of branchmerge that installs it."""


def typed(cfg: DictConfig, schema: type[Schema]) -> Schema:
    """Resolve and check a composed configuration; raises UserError on a value that cannot work."""
    missing = _first_missing(cfg, "")
    if missing:
        raise UserError(f"{missing} has no value; give it on the command line or in the study's file")
    domain = OmegaConf.select(cfg, "domain.name")
    if domain is not None and domain not in cfg.study.budget:
        known = ", ".join(cfg.study.budget)
        raise UserError(f"domain={domain}: the study {cfg.study.name} has no budget for it; it has {known}")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)
    _check(config, "")
    if isinstance(config, TrainConfig):
        _check_train(config)
    return config


def check_packages(config: TrainConfig) -> None:
    """Refuse settings whose package is not installed, and name the extra that installs it."""
    wanted = {f"logger={config.logger.kind}", f"optim.optimizer={config.optim.optimizer}"}
    for setting, (package, extra) in PACKAGES.items():
        if setting in wanted and find_spec(package) is None:
            raise UserError(f"{setting}: {package} is not installed; pip install 'branchmerge[{extra}]'")


def check_trainer(trainer: TrainerConfig) -> None:
    """Refuse trainer settings that contradict each other."""
    if not trainer.sharded:
        defaults = TrainerConfig()
        for name in ("devices", "num_nodes", "gpus_per_job", "replicate", "context_parallel", "cpu_offload"):
            given = getattr(trainer, name)
            if given != getattr(defaults, name) and (name, given) != ("devices", 1):
                raise UserError(
                    f"trainer.{name}={given}: trainer.strategy={trainer.strategy} is a training on one device; for"
                    " several use trainer=fsdp"
                )
    if trainer.gpus_per_job is not None and trainer.devices not in (None, trainer.gpus_per_job):
        raise UserError(
            f"trainer.gpus_per_job={trainer.gpus_per_job}: trainer.devices={trainer.devices} asks for another number;"
            " give one of them (trainer.devices=null)"
        )
    if trainer.devices is not None:
        check_groups(trainer, trainer.devices * trainer.num_nodes)


def check_groups(trainer: TrainerConfig, devices: int) -> None:
    """Refuse a number of devices that does not divide into replicas, or into groups that share a row."""
    if devices % trainer.replicate:
        raise UserError(
            f"trainer.replicate={trainer.replicate}: {devices} devices cannot be cut into so many equal sets; use a"
            f" multiple of {trainer.replicate}"
        )
    shared = trainer.context_parallel
    if devices % shared:
        raise UserError(
            f"trainer.context_parallel={shared}: {devices} devices make no such groups; use a multiple of {shared}"
        )


def _first_missing(node: DictConfig, prefix: str) -> str:
    """The first key without a value, interpolations aside; empty if all have one."""
    for key in map(str, node):
        if OmegaConf.is_interpolation(node, key):
            continue
        if OmegaConf.is_missing(node, key):
            return f"{prefix}{key}"
        if isinstance(node[key], DictConfig):
            found = _first_missing(node[key], f"{prefix}{key}.")
            if found:
                return found
    return ""


def _check(node: Any, prefix: str) -> None:
    """Check names, choices and ranges of every field, nested dataclasses included."""
    _check_names(node, prefix)
    for item in fields(node):
        value, name = getattr(node, item.name), f"{prefix}{item.name}"
        if is_dataclass(value):
            _check(value, f"{name}.")
            continue
        if isinstance(value, dict):
            for key, entry in value.items():
                if is_dataclass(entry):
                    _check(entry, f"{name}.{key}.")
        if value is not None:
            _check_value(name, value, item.metadata)


def _check_value(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Refuse a value, or a list of numbers, outside the bounds of its field (config/bounds.py)."""
    if value in ("", []) and not bounds.get("empty", True):
        raise UserError(f"{name}={value}: is empty; give {'a folder' if value == '' else 'some'}, or leave it out")
    choices, low, high = (bounds.get(key) for key in ("choices", "low", "high"))
    if choices is not None and value not in choices:
        if why := WRONG_PRECISIONS.get(str(value)):
            raise UserError(f"{name}={value}: {why}; use bf16-mixed or 32-true")
        raise UserError(f"{name}={value}: choose one of {', '.join(choices)}")
    for number in value if isinstance(value, list | tuple) else [value]:
        if low is not None and not number >= low:
            raise UserError(f"{name}={value}: must be at least {low}")
        if high is not None and not number <= high:
            raise UserError(f"{name}={value}: must be at most {high}")
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{name}={value}: must be a number that is not infinite")


def _check_names(node: Any, prefix: str) -> None:
    """Refuse keys that the schema does not have: Hydra itself adds any key given with a + in front."""
    known = [item.name for item in fields(node)]
    for name in vars(node):
        if name not in known:
            raise UserError(no_such_key(prefix, name, known))


def no_such_key(prefix: str, name: str, known: Sequence[str]) -> str:
    """What is said of a key that is none of those `known`; `prefix` is what stands before it, with its dot."""
    alike = get_close_matches(name, known, n=1)
    meant = f"did you mean {prefix}{alike[0]}?" if alike else f"{', '.join(known)} are there"
    return f"{prefix}{name}: there is no such key; {meant}"


def _check_optim(optim: OptimConfig) -> None:
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas={list(optim.betas)}: give two numbers from 0 to below 1, such as [0.9,0.95]")


def _check_train(config: TrainConfig) -> None:
    """Refuse settings of train.py that contradict each other."""
    every = config.trainer.validate_every_n_steps
    if every is not None and not config.data.validation_rows:
        raise UserError(
            f"trainer.validate_every_n_steps={every}: no rows are held out to validate on; give data.validation_rows="
        )
    if config.data.path is None and config.data.format != DataConfig.format:
        raise UserError(f"data.format={config.data.format}: is that of data.path=, which is not given; give it too")
    shared, attn = config.trainer.context_parallel, config.backbone.attn
    if shared > 1 and attn not in ("auto", "sdpa"):
        raise UserError(f"backbone.attn={attn}: trainer.context_parallel={shared} takes torch's own; leave it out")
    if not config.plan:  # a plan reports it and continues
        check_trainer(config.trainer)
    _check_optim(config.optim)
    unknown = [part for part in config.domain.parts if part not in config.study.corpus]
    if unknown and config.data.path is None:
        known = ", ".join(config.study.corpus)
        raise UserError(
            f"domain={config.domain.name}: the study {config.study.name} has no corpus {unknown[0]!r} (it has {known});"
            " add it to the study's file or give data.path="
        )
    if config.domain.name == "warmup" and not config.study.warmup and config.out is None:
        raise UserError(
            f"domain=warmup: the study {config.study.name} starts from a ready backbone and has no warm-up;"
            " give out= to train on it all the same"
        )
