"""A recipe says everything about a merge: operator, parameters, tree, the folders of the leaves, where it goes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from branchmerge.config import MergeConfig
from branchmerge.errors import UserError
from branchmerge.machine import device_of
from branchmerge.merge.fold import TensorFold
from branchmerge.merge.operators import Operator, changed_parameters, make_operator, parameters_of
from branchmerge.merge.rules import Rule, parse_rules
from branchmerge.merge.tree import Tree, parse
from branchmerge.merge.vocabulary import WAYS
from branchmerge.student import backbone
from branchmerge.study import Study, place, read_manifest

NOTHING = np.empty(0)
"""What a dry run merges."""


@dataclass(frozen=True)
class Recipe:
    """What `merge` needs to know; `from_config` makes one out of merge.py's configuration."""

    operator_name: str
    operator: Operator
    tree: Tree
    folders: dict[str, Path]
    """Checkpoint folder of every leaf."""
    out: Path
    base: Path | None = None
    """Checkpoint of the backbone, for operators that need it."""
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    progress: bool = True
    config: dict[str, Any] = field(default_factory=dict)
    """Resolved configuration, for the manifest."""
    rules: tuple[Rule, ...] = ()
    """Other parameters for some tensors."""
    device: str = "cpu"
    """Where the arithmetic is done: cpu, cuda, cuda:1, ..."""
    expected: dict[Path, str] = field(default_factory=dict)
    """SHA-256 that the weights of the models must have; empty for any."""
    anatomy: bool = False
    """Compare the result with what it was made of, and draw that."""
    origin: Path | None = None
    """Checkpoint of the backbone for the anatomy, where the operator does not need it; no parent of the result."""
    vocab: str = "same"
    """What happens to vocabularies that differ, see vocabulary.py."""

    def __post_init__(self) -> None:
        if self.vocab not in WAYS:
            raise UserError(f"vocab={self.vocab}: choose one of {', '.join(WAYS)}")
        lost = [leaf for leaf in self.tree.leaves if leaf not in self.folders]
        if lost:
            raise UserError(f"tree={self.tree.nested()}: no folder is given for {lost[0]}; add it to folders")
        if not self.operator.n_way:
            _check_binary(self.tree, self.operator_name)
        # A dry run on empty tensors finds parameters that do not fit the tree, such as two weights for three models.
        for operator in (self.operator, *(self._with([rule]) for rule in self.rules)):
            try:
                TensorFold("dry run", lambda _: NOTHING, NOTHING).merge(self.tree, operator)
            except ValueError as error:
                raise UserError(f"tree={self.tree.nested()}: {self.operator_name} cannot merge it: {error}") from error

    def operator_for(self, tensor: str) -> Operator:
        """The operator with the parameters that the rules give it for this tensor."""
        return self._with([rule for rule in self.rules if rule.holds_for(tensor)])

    def _with(self, rules: Sequence[Rule]) -> Operator:
        changed = {key: value for rule in rules for key, value in rule.parameters.items()}
        if not changed:
            return self.operator
        return make_operator(self.operator_name, {**parameters_of(self.operator), **changed})

    @property
    def name(self) -> str:
        return self.out.name


def from_config(config: MergeConfig, resolved: dict[str, Any]) -> Recipe:
    """Find the study's experts and name the result; raises UserError before any weight is read."""
    parameters = dict(config.operator)
    operator_name = str(parameters.pop("name"))
    operator = make_operator(operator_name, parameters)
    usual = make_operator(operator_name, config.study.operators.get(operator_name, {}))
    rules = parse_rules(config.rules)
    study = Study(config)
    default = parse(config.study.tree)
    if operator.n_way:
        default = default.flat()
    tree = default if config.tree is None else parse(config.tree)
    folders = {leaf: _folder(study, leaf) for leaf in tree.leaves}
    if config.out is not None:
        out = place(config.out)
    else:
        out = study.merged(_name(operator_name, operator, usual, tree, default, rules, config.vocab))
    base = backbone.locate(config) if operator.needs_base() else None
    ours = all(folder.parent == study.expert("*").parent for folder in folders.values())
    origin = backbone.find(config) if config.anatomy and base is None and (ours or config.backbone.path) else None
    shard = int(config.max_shard_gb * 1e9)
    device = "cpu" if config.device == "cpu" else str(device_of(config.device))  # which asks torch
    return Recipe(
        operator_name,
        operator,
        tree,
        folders,
        out,
        base,
        shard,
        config.overwrite,
        config.progress,
        resolved,
        rules,
        device,
        anatomy=config.anatomy,
        origin=origin,
        vocab=config.vocab,
    )


def _folder(study: Study, leaf: str) -> Path:
    """Checkpoint of a leaf: an expert of the study by its domain, else a folder."""
    expert = study.expert(leaf)
    if "/" not in leaf and read_manifest(expert) is not None:
        return expert
    folder = Path(leaf).expanduser()
    if leaf in study.experts or not (folder.is_dir() or "/" in leaf):
        known = sorted(path.parent.name for path in study.expert("*").parent.glob("*/manifest.json"))
        raise UserError(
            f"tree: there is no expert {leaf!r} at {expert}; train it with python train.py study={study.root.name}"
            f" domain={leaf}, or name a checkpoint folder (there now: {', '.join(known) or 'none'})"
        )
    backbone.check_checkpoint(folder)
    return folder


def _name(
    operator_name: str, operator: Operator, usual: Operator, tree: Tree, default: Tree, rules: tuple[Rule, ...],
    vocab: str,
) -> str:  # fmt: skip
    """How the result was made: the operator, parameters that are not the study's usual ones, rules, another tree."""
    parts = [operator_name, *(f"{key}{_value(value)}" for key, value in changed_parameters(operator, usual).items())]
    if rules:
        parts.append(f"rules{hashlib.sha256(repr(rules).encode()).hexdigest()[:6]}")
    if vocab != "same":
        parts.append(f"vocab_{vocab}")
    if tree != default:
        if any("/" in leaf for leaf in tree.leaves):
            raise UserError(f"tree={tree.nested()}: say where a merge of other folders goes, with out=/my/merged")
        parts.append(tree.name())
    return "-".join(parts)


def _value(value: Any) -> str:
    return "_".join(_value(item) for item in value) if isinstance(value, list | tuple) else str(value)


def _check_binary(tree: Tree, operator_name: str) -> None:
    for child in tree.children:
        _check_binary(child, operator_name)
    if len(tree.children) not in (0, 2):
        raise UserError(
            f"tree={tree.nested()}: {operator_name} merges two models at a time; nest them, as in [code,[science,math]]"
        )
