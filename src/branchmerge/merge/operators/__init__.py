"""Merge operators: one file each, pure functions of tensors and parameters.

base.py says what an operator is. To add one: write its file, list it here, add conf/operator/<name>.yaml.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from branchmerge.errors import UserError
from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.operators.arcee_fusion_mergekit import ArceeFusionMergekit
from branchmerge.merge.operators.arcee_fusion_null import ArceeFusionNull
from branchmerge.merge.operators.arcee_fusion_paper import ArceeFusionPaper
from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.breadcrumbs import Breadcrumbs
from branchmerge.merge.operators.dare_linear import DareLinear
from branchmerge.merge.operators.dare_ties import DareTies
from branchmerge.merge.operators.della import Della
from branchmerge.merge.operators.karcher import Karcher
from branchmerge.merge.operators.linear import Linear
from branchmerge.merge.operators.model_stock import ModelStock
from branchmerge.merge.operators.multislerp import MultiSlerp
from branchmerge.merge.operators.nuslerp import NuSlerp
from branchmerge.merge.operators.sce import Sce
from branchmerge.merge.operators.slerp import Slerp
from branchmerge.merge.operators.task_arithmetic import TaskArithmetic
from branchmerge.merge.operators.ties import Ties

__all__ = ["OPERATORS", "Operator", "changed_parameters", "make_operator", "parameters_of"]


OPERATORS: dict[str, type[Operator]] = {
    "arcee_fusion": ArceeFusion,
    "arcee_fusion_paper": ArceeFusionPaper,
    "arcee_fusion_mergekit": ArceeFusionMergekit,
    "arcee_fusion_null": ArceeFusionNull,
    "breadcrumbs": Breadcrumbs,
    "dare_linear": DareLinear,
    "dare_ties": DareTies,
    "della": Della,
    "karcher": Karcher,
    "linear": Linear,
    "model_stock": ModelStock,
    "multislerp": MultiSlerp,
    "nuslerp": NuSlerp,
    "sce": Sce,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
}


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
