"""Multi-SLERP: the direction of the weighted sum of the models' directions, at their weighted mean norm.

    u_i = W_i / |W_i|
    W = (sum_i w_i u_i) / |sum_i w_i u_i| * sum_i w_i |W_i|

With `from_base`, W_i are the differences from the backbone, which is added again. The guide describes a further step
in the tangent space at that direction. That step is zero: the projections w_i (u_i - <u_i, m> m) of the u_i onto the
tangent space at the direction m of their own sum cancel. `karcher` iterates from there along the sphere.

Source: the merge method guide of mergekit (Goddard et al., Arcee's MergeKit, arXiv 2403.13257).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination, gram
from branchmerge.merge.operators.limits import switch
from branchmerge.merge.operators.sphere import at_norm, direction, units
from branchmerge.merge.operators.task_vectors import backbone
from branchmerge.merge.operators.weights import as_weights, shares_of_one, weights_for


@dataclass(frozen=True)
class MultiSlerp(Operator):
    """Any number of models, with their backbone or without -> their weighted mean on the sphere.

    Where their directions cancel it is the plain weighted mean.
    """

    weights: tuple[float, ...] | None = None
    """One weight a model, in the order of the tree; null for equal ones."""
    normalize: bool = True
    """Scale the weights to sum to one."""
    from_base: bool = False
    """Average the differences from the backbone in place of the weights themselves."""

    late = frozenset({"weights", "normalize"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", as_weights(self.weights))
        switch("normalize", self.normalize)
        switch("from_base", self.from_base)
        if self.normalize and self.weights is not None and not sum(self.weights):
            raise ValueError(f"weights {self.weights} sum to zero, so they cannot be made to sum to one")

    def needs_base(self) -> bool:
        return self.from_base

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        return gram(models, backbone(base) if self.from_base else None)

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        c = self.coefficients(measured)
        if not self.from_base:
            return combination(c, models)
        return combination([1 - sum(c), *c], [backbone(base), *models])

    def coefficients(self, G: Tensor) -> list[float]:
        """Coefficients of the mean of tensors with the Gram matrix G, float64 [n, n]."""
        n = len(G)
        norms, U, w = units(G, shares_of_one(self.weights, n) if self.normalize else weights_for(self.weights, n))
        c = direction(w, U)
        return w.tolist() if c is None else at_norm(c, norms, w)
