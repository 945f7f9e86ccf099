"""A recipe: everything about a merge, that is operator, parameters, tree, folders of the leaves, output folder."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from branchmerge.config import MergeConfig
from branchmerge.errors import UserError
from branchmerge.machine import device_of
from branchmerge.merge.fold import TensorFold
from branchmerge.merge.operators import OPERATORS, Operator, changed_parameters, make_operator, parameters_of
from branchmerge.merge.rules import Rule, parse_rules
from branchmerge.merge.tree import Tree, parse
from branchmerge.merge.vocabulary import WAYS
from branchmerge.student import backbone
from branchmerge.study import Study, place, read_manifest

FOLLOWS = {"arcee_fusion_null": "arcee_fusion"}
"""Controls take the study's parameters of the operator that they are controls of."""
NOTHING = np.empty(0)
"""The tensor that a dry run merges."""


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
    """SHA-256 that the weights of folders must have; those not listed may have any."""
    anatomy: bool = False
    """Compare the result with its parents, and draw figures."""
    origin: Path | None = None
    """Checkpoint of the backbone for the anatomy alone, if the operator does not need it; not a parent of the
    result."""
    vocab: str = "same"
    """What happens to vocabularies that differ, see vocabulary.py."""

    def __post_init__(self) -> None:
        if self.vocab not in WAYS:
            raise UserError(f"vocab={self.vocab}: choose one of {', '.join(WAYS)}")
        lost = [leaf for leaf in self.tree.leaves if leaf not in self.folders]
        if lost:
            raise UserError(f"tree={self.tree.nested()}: no folder is given for {lost[0]}; add it to folders")
        self._check_folders()
        if not self.operator.n_way:
            _check_binary(self.tree, self.operator_name)
        for operator in _operators(self.operator_name, self.operator, self.rules):
            self._dry_run(operator)

    def _check_folders(self) -> None:
        """Refuse a model with two names in the tree, and an output folder that would replace a parent."""
        leaves: dict[Path, str] = {}
        for leaf in self.tree.leaves:
            first = leaves.setdefault(self.folders[leaf].resolve(), leaf)
            if first != leaf:
                raise UserError(
                    f"tree={self.tree.nested()}: {first} and {leaf} are one folder; each model may be merged once"
                )
        out = self.out.resolve()
        for folder in (*leaves, *(known.resolve() for known in (self.base, self.origin) if known is not None)):
            if folder.is_relative_to(out):
                raise UserError(f"{self.out}: would replace {folder}, which it is made from; give another out=")

    def check_rules(self, tensors: Sequence[str]) -> None:
        """Refuse rules that hold for no tensor, and rules that cannot hold together for some tensor."""
        for rule in self.rules:
            if not any(rule.holds_for(tensor) for tensor in tensors):
                raise UserError(
                    f"rules: {rule.entry()} holds for no tensor; names are such as {', '.join(tensors[-2:])}"
                )
        seen: list[tuple[Rule, ...]] = []
        for tensor in tensors:
            rules = self._rules_for(tensor)
            if len(rules) > 1 and rules not in seen:
                seen.append(rules)
                try:
                    self._dry_run(self.operator_for(tensor))
                except UserError as error:
                    raise UserError(f"rules: those for {tensor} cannot hold together: {error}") from error

    def _dry_run(self, operator: Operator) -> None:
        """Merge empty tensors, to find parameters that do not fit the tree, such as two weights for three models."""
        base = None if self.base is None else NOTHING
        try:
            TensorFold("dry run", lambda _: NOTHING, base).merge(self.tree, operator)
        except ValueError as error:
            raise UserError(f"tree={self.tree.nested()}: {self.operator_name} cannot merge it: {error}") from error

    def operator_for(self, tensor: str) -> Operator:
        """The operator with the parameters that the rules give it for this tensor."""
        return _ruled(self.operator_name, self.operator, self._rules_for(tensor))

    def _rules_for(self, tensor: str) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if rule.holds_for(tensor))

    @property
    def again(self) -> str:
        """How exactly recipe.yaml reproduces the model."""
        if self.device != "cpu":
            return "on a GPU of the same kind"
        portable = all(one.is_portable() for one in _operators(self.operator_name, self.operator, self.rules))
        return "byte for byte" if portable else "byte for byte on a processor of the same kind"

    @property
    def name(self) -> str:
        return self.out.name


def _ruled(operator_name: str, operator: Operator, rules: Sequence[Rule]) -> Operator:
    """An operator with the parameters of some rules; of several values the last one counts."""
    changed = {key: value for rule in rules for key, value in rule.parameters.items()}
    known = parameters_of(operator)
    for key in changed:
        if key not in known:
            there = ", ".join(["tensors", "layers", *sorted(known)])
            raise UserError(f"rules: {key}: {operator_name} has no such parameter; in a rule stand {there}")
    return make_operator(operator_name, {**known, **changed}) if changed else operator


def _operators(operator_name: str, operator: Operator, rules: Sequence[Rule]) -> list[Operator]:
    """An operator as it is, and as each rule alone changes it."""
    return [operator, *(_ruled(operator_name, operator, [rule]) for rule in rules)]


def from_config(config: MergeConfig, resolved: dict[str, Any]) -> Recipe:
    """Find the study's experts and name the result; raises UserError before any weight is read."""
    parameters = dict(config.operator)
    operator_name = str(parameters.pop("name"))
    operator = make_operator(operator_name, parameters)
    usual = _usual(operator_name, config.study.operators)
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
    needs_base = any(one.needs_base() for one in _operators(operator_name, operator, rules))
    base = backbone.locate(config) if needs_base else None
    ours = all(folder.parent == study.expert("*").parent for folder in folders.values())
    origin = backbone.find(config) if config.anatomy and base is None and (ours or config.backbone.path) else None
    shard = int(config.max_shard_gb * 1e9)
    device = "cpu" if config.device == "cpu" else str(device_of(config.device))  # device_of imports torch
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


def _usual(operator_name: str, of_study: Mapping[str, Mapping[str, Any]]) -> Operator:
    """The operator with the study's parameters, which are the defaults of the command line and of the result's name."""
    for name in of_study:
        if name not in OPERATORS:
            raise UserError(f"study.operators.{name}: there is no such operator; choose one of {', '.join(OPERATORS)}")
    followed = of_study.get(FOLLOWS.get(operator_name, ""), {})
    return make_operator(operator_name, {**followed, **of_study.get(operator_name, {})})


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
