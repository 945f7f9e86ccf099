"""Task arithmetic: the backbone plus the weighted sum of the task vectors W_i - W_0.

    W = W_0 + lam sum_i w_i (W_i - W_0)

Source: Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination
from branchmerge.merge.operators.limits import number, switch
from branchmerge.merge.operators.weights import as_weights, shares_of_one, weights_for


@dataclass(frozen=True)
class TaskArithmetic(Operator):
    """Any number of models and their backbone -> backbone + lam * sum of w_i (W_i - backbone)."""

    weights: tuple[float, ...] | None = None
    """Factor of each task vector; one number for all of them, null for 1."""
    lam: float = 1.0
    """Factor of their sum."""
    normalize: bool = False
    """Make the weights sum to one."""

    late = frozenset({"weights", "lam", "normalize"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", as_weights(self.weights))
        object.__setattr__(self, "lam", number("lam", self.lam))
        switch("normalize", self.normalize)
        if self.normalize and self.weights is not None and not sum(self.weights):
            raise ValueError(f"weights {self.weights} sum to zero, so they cannot be made to sum to one")

    def needs_base(self) -> bool:
        return True

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        if base is None:
            raise ValueError("task arithmetic needs the backbone's tensor")
        n = len(models)
        w = shares_of_one(self.weights, n) if self.normalize else weights_for(self.weights, n)
        c = [self.lam * w_i for w_i in w]
        return combination([1 - sum(c), *c], [base, *models])
