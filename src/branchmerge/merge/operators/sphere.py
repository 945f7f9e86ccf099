"""Means on the sphere, computed in the span of the models from the Gram matrix of their tensors.

Every mean is a combination of the models; a point is written as its coefficients c over the unit vectors
u_i = W_i / |W_i|, so that <u_i, point> = (U c)_i with U the Gram matrix of the unit vectors.

Shapes: n models; G float64 [n, n], as from `blocks.gram`.
"""

from collections.abc import Sequence
from math import acos, cos, sin

import torch
from torch import Tensor

STRAIGHT = 1e-6
"""Sine below which two directions count as equal (or opposite), so that the arc is a line (or undefined)."""


def arc(G: Tensor, t: float, straight: float = STRAIGHT) -> list[float]:
    """Coefficients of two tensors at the fraction t of the arc between them.

        sin((1 - t) theta) / sin(theta),  sin(t theta) / sin(theta)

    Args:
        G: float64 [2, 2]
        t: 0 is the first tensor, 1 the second
        straight: sine of the angle below which the straight line is taken (1 - t, t), as it is for tensors of zeros
    """
    norms = G.diagonal().sqrt()
    scale = float(norms[0] * norms[1])
    theta = acos(max(-1.0, min(1.0, float(G[0, 1]) / scale))) if scale else 0.0
    if sin(theta) < straight:
        return [1 - t, t]
    return [sin((1 - t) * theta) / sin(theta), sin(t * theta) / sin(theta)]


def units(G: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Norms [n], Gram matrix U [n, n] of the unit vectors, weights [n]; a tensor of zeros gets 0 in all three."""
    norms = G.diagonal().sqrt()
    there = norms > 0
    inverse = torch.where(there, 1 / norms, 0.0)
    return norms, inverse[:, None] * G * inverse, torch.where(there, torch.tensor(weights, dtype=G.dtype), 0.0)


def direction(c: Tensor, U: Tensor) -> Tensor | None:
    """The unit vector in the direction of c; None where the vectors cancel."""
    length = (c @ U @ c).clamp_min(0).sqrt()
    return c / length if length > STRAIGHT * c.abs().sum() else None


def log_map(c: Tensor, U: Tensor, w: Tensor) -> Tensor:
    """Weighted sum of the tangent vectors from the point c to each unit vector, its length the angle between them.

    sum_i w_i theta_i / sin(theta_i) (u_i - cos(theta_i) c)
    """
    cosines = (U @ c).clamp(-1, 1)
    theta = torch.acos(cosines)
    # From c, neither c itself nor its opposite (as in tensors of one element) has a direction: they add nothing.
    stretch = torch.where(torch.sin(theta) > STRAIGHT, theta / torch.sin(theta), 1.0)
    return w * stretch - (w * stretch * cosines).sum() * c


def exp_map(c: Tensor, tangent: Tensor, U: Tensor) -> Tensor:
    """The point that is reached from c along a tangent vector that is not zero."""
    length = float((tangent @ U @ tangent).sqrt())
    reached = cos(length) * c + sin(length) / length * tangent
    # Renormalised, so that rounding errors do not add up over many steps.
    return reached / (reached @ U @ reached).sqrt()


def at_norm(c: Tensor, norms: Tensor, w: Tensor) -> list[float]:
    """Coefficients over the tensors themselves of the point c, at the weighted mean of their norms."""
    return torch.where(norms > 0, c * (w * norms).sum() / norms, 0.0).tolist()
