"""Task arithmetic: the backbone plus the weighted sum of the task vectors W_i - W_0.

Source: Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination
from branchmerge.merge.operators.weights import as_weights, weights_for


@dataclass(frozen=True)
class TaskArithmetic(Operator):
    """Any number of models and their backbone -> backbone + sum of w_i (W_i - backbone)."""

    weights: tuple[float, ...] | None = None
    """Factor of each task vector; one number for all of them, null for 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", as_weights(self.weights))

    def needs_base(self) -> bool:
        return True

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        if base is None:
            raise ValueError("task arithmetic needs the backbone's tensor")
        w = weights_for(self.weights, len(models))
        return combination([1 - sum(w), *w], [base, *models])
