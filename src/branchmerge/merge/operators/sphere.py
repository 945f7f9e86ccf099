"""Means on the sphere, worked out in the plane of the models: all they need is the Gram matrix of the tensors.

Every mean is a combination of the models; a point is written as its coefficients c over the unit vectors
u_i = W_i / |W_i|, so that <u_i, point> = (U c)_i with U the Gram matrix of the unit vectors.

Shapes: n models; G float64 [n, n], as from `blocks.gram`.
"""

from collections.abc import Sequence
from math import acos, cos, sin

import torch
from torch import Tensor

STRAIGHT = 1e-6
"""Sine below which two directions are one (or opposite), so that the arc between them is a line (or undefined)."""


def arc(G: Tensor, t: float, straight: float = STRAIGHT) -> list[float]:
    """Coefficients of two tensors at the fraction t of the arc between them.

        sin((1 - t) theta) / sin(theta),  sin(t theta) / sin(theta)

    Args:
        G: float64 [2, 2]
        t: 0 is the first tensor, 1 the second
        straight: sine of the angle below which the straight line is taken: 1 - t, t. So it is for tensors of zeros.
    """
    norms = G.diagonal().sqrt()
    scale = float(norms[0] * norms[1])
    theta = acos(max(-1.0, min(1.0, float(G[0, 1]) / scale))) if scale else 0.0
    if sin(theta) < straight:
        return [1 - t, t]
    return [sin((1 - t) * theta) / sin(theta), sin(t * theta) / sin(theta)]


def units(G: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Norms [n], Gram matrix U [n, n] of the unit vectors, weights [n]: zero for a tensor of zeros, as it points nowhere."""
    norms = G.diagonal().sqrt()
    there = norms > 0
    inverse = torch.where(there, 1 / norms, 0.0)
    return norms, inverse[:, None] * G * inverse, torch.where(there, torch.tensor(weights, dtype=G.dtype), 0.0)


def normalized(c: Tensor, U: Tensor) -> Tensor:
    """The point in the direction of c, of length one; raises ValueError where the vectors cancel."""
    length = (c @ U @ c).clamp_min(0).sqrt()
    if length < 1e-12:
        raise ValueError("the models point in opposite directions and cancel, so they have no mean direction")
    return c / length


def log_map(c: Tensor, U: Tensor, w: Tensor) -> Tensor:
    """Weighted sum of the tangent vectors from the point c to each unit vector, its length the angle between them.

        sum_i w_i theta_i / sin(theta_i) (u_i - cos(theta_i) c)
    """
    cosines = (U @ c).clamp(-1, 1)
    theta = torch.acos(cosines)
    stretch = torch.where(theta > STRAIGHT, theta / torch.sin(theta), 1.0)
    return w * stretch - (w * stretch * cosines).sum() * c


def exp_map(c: Tensor, tangent: Tensor, U: Tensor) -> Tensor:
    """The point that is reached from c along a tangent vector."""
    length = float((tangent @ U @ tangent).clamp_min(0).sqrt())
    if not length:
        return c
    return normalized(cos(length) * c + sin(length) / length * tangent, U)
