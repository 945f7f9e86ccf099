"""Karcher mean: the direction with the least sum of squared angles to those of the models, at their mean norm.

    repeat   T = 1/n sum_i theta_i / sin(theta_i) (u_i - cos(theta_i) m)       towards the mean, from m
             m = cos(|T|) m + sin(|T|) T / |T|                                 until |T| < tol
    W = m mean |W_i|,    u_i = W_i / |W_i|,   m at first the direction of the sum of the u_i

Source: Karcher, Riemannian center of mass and mollifier smoothing (1977); the iteration as in Pennec (2006).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination, gram
from branchmerge.merge.operators.limits import positive, whole
from branchmerge.merge.operators.sphere import at_norm, direction, exp_map, log_map, units


@dataclass(frozen=True)
class Karcher(Operator):
    """Any number of models -> their mean on the sphere; the plain mean where their directions cancel.

    Tensors of zeros are left out.
    """

    max_iter: int = 10
    """Largest number of steps."""
    tol: float = 1e-5
    """The iteration has converged when a step, an angle, is shorter than this."""

    def __post_init__(self) -> None:
        whole("max_iter", self.max_iter, 1)
        object.__setattr__(self, "tol", positive("tol", self.tol))

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> list[float]:
        return self.coefficients(gram(models))

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        return combination(measured, models)

    def coefficients(self, G: Tensor) -> list[float]:
        """Coefficients of the mean of tensors with the Gram matrix G, float64 [n, n]."""
        norms, U, w = units(G, [1.0] * len(G))
        w = w / w.sum().clamp_min(1)
        c = direction(w, U)
        if c is None:
            return w.tolist()
        for _ in range(self.max_iter):
            step = log_map(c, U, w)
            if (step @ U @ step).clamp_min(0).sqrt() < self.tol:
                break
            c = exp_map(c, step, U)
        return at_norm(c, norms, w)
