"""Linear average ("model soup"): sum of w_i W_i, with the weights made to sum to one.

Source: Wortsman et al., Model soups (arXiv 2203.05482).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination
from branchmerge.merge.operators.limits import switch
from branchmerge.merge.operators.weights import as_weights, shares_of_one, weights_for


@dataclass(frozen=True)
class Linear(Operator):
    """Any number of models -> their weighted mean."""

    weights: tuple[float, ...] | None = None
    """One weight a model, in the order of the tree; null for equal ones."""
    normalize: bool = True
    """Make the weights sum to one; false: a weighted sum."""

    late = frozenset({"weights", "normalize"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", as_weights(self.weights))
        switch("normalize", self.normalize)
        if self.normalize and self.weights is not None and not sum(self.weights):
            raise ValueError("weights sum to zero, so their mean is undefined")

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        n = len(models)
        return combination(shares_of_one(self.weights, n) if self.normalize else weights_for(self.weights, n), models)
