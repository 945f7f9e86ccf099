"""Merge operators: one file each, pure functions of tensors and parameters.

base.py says what an operator is. To add one: write its file, list its class here, add conf/operator/<name>.yaml.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from branchmerge.errors import UserError
from branchmerge.merge.operators.base import Operator

__all__ = ["OPERATORS", "Operator", "changed_parameters", "make_operator", "parameters_of"]

CLASSES = {
    "arcee_fusion": "ArceeFusion",
    "arcee_fusion_paper": "ArceeFusionPaper",
    "arcee_fusion_mergekit": "ArceeFusionMergekit",
    "arcee_fusion_null": "ArceeFusionNull",
    "breadcrumbs": "Breadcrumbs",
    "dare_linear": "DareLinear",
    "dare_ties": "DareTies",
    "della": "Della",
    "karcher": "Karcher",
    "linear": "Linear",
    "model_stock": "ModelStock",
    "multislerp": "MultiSlerp",
    "nuslerp": "NuSlerp",
    "sce": "Sce",
    "slerp": "Slerp",
    "task_arithmetic": "TaskArithmetic",
    "ties": "Ties",
}
"""The class of each operator, in the file of its name"""


class _Operators(Mapping[str, type[Operator]]):
    """Operator classes by name; each file is imported when its operator is first used, since most need torch."""

    def __getitem__(self, name: str) -> type[Operator]:
        kind: type[Operator] = getattr(import_module(f"{__name__}.{name}"), CLASSES[name])
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(CLASSES)

    def __len__(self) -> int:
        return len(CLASSES)

    def __contains__(self, name: object) -> bool:
        return name in CLASSES


OPERATORS: Mapping[str, type[Operator]] = _Operators()


def make_operator(name: str, parameters: Mapping[str, Any]) -> Operator:
    """Build an operator; raises UserError on an unknown name, an unknown parameter or a value it cannot work with."""
    if name not in OPERATORS:
        raise UserError(f"operator={name}: choose one of {', '.join(OPERATORS)}")
    kind = OPERATORS[name]
    known = {item.name for item in fields(kind)}
    for key in parameters:
        if key not in known:
            raise UserError(f"operator.{key}: {name} has no such parameter; it has {', '.join(sorted(known))}")
    try:
        return kind(**parameters)
    except (TypeError, ValueError) as error:
        raise UserError(f"operator={name} with {dict(parameters)}: {error}") from error


def parameters_of(operator: Operator) -> dict[str, Any]:
    """All parameters with their values."""
    return {item.name: getattr(operator, item.name) for item in fields(operator)}


def changed_parameters(operator: Operator, usual: Operator) -> dict[str, Any]:
    """The parameters of `operator` that differ from those of `usual`."""
    before = parameters_of(usual)
    return {key: value for key, value in parameters_of(operator).items() if value != before[key]}
