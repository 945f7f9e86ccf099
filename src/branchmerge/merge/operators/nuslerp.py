"""NuSLERP: SLERP with a weight for each model, and of task vectors where `from_base` says so.

    t = w_R / (w_L + w_R);   W = sin((1 - t) theta) / sin(theta) W_L + sin(t theta) / sin(theta) W_R

With `from_base`, W_L and W_R are the differences from the backbone, which is added again.

Source: the merge method guide of mergekit (Goddard et al., Arcee's MergeKit, arXiv 2403.13257).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination, gram
from branchmerge.merge.operators.limits import switch
from branchmerge.merge.operators.sphere import arc
from branchmerge.merge.operators.task_vectors import backbone
from branchmerge.merge.operators.weights import as_weights, shares_of_one


@dataclass(frozen=True)
class NuSlerp(Operator):
    """Left and Right, with their backbone or without -> a point on the arc between them."""

    weights: tuple[float, ...] | None = None
    """Weight of Left and of Right, none below zero; null for the middle."""
    from_base: bool = False
    """Interpolate the differences from the backbone in place of the weights themselves."""

    n_way: ClassVar[bool] = False
    late = frozenset({"weights"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", as_weights(self.weights))
        if self.weights is not None and (min(self.weights) < 0 or not sum(self.weights)):
            raise ValueError(f"weights must be at least 0 and not all 0, they are {self.weights}")
        switch("from_base", self.from_base)

    def needs_base(self) -> bool:
        return self.from_base

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        left, right = models
        return gram([left, right], backbone(base) if self.from_base else None)

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        c = arc(measured, shares_of_one(self.weights, 2)[1])
        if not self.from_base:
            return combination(c, models)
        return combination([1 - sum(c), *c], [backbone(base), *models])
