"""Arcee Fusion: keep Left, and take Right where the two differ in an important way.

As in the code of TinyR1-32B-Preview's authors (mergekit 0.1), but in exact arithmetic:

    S = KL(Right || Left) * |Left - Right|      KL by row, over softmax of the last dimension
    T = median(S) + lam * (Q3(S) - Q1(S))       exact order statistics, no sampling
    out = Right where S >= T, else Left

The KL of two fine-tunes of one backbone is about 1e-8; softmax and logarithm in float32 return mostly rounding noise
there (a Jaccard overlap of 0.26 with the true mask), so it is computed in a form without cancellation.

Shapes: R rows, C columns; a vector is one row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import row_length

BLOCK = 1 << 20
"""Elements whose float64 temporaries are held at once."""
NEAR = 0.5
"""Rows that differ by less than this everywhere take the cancellation-free form."""


@dataclass(frozen=True)
class ArceeFusion(Operator):
    """Left and Right -> their selective fusion."""

    lam: float = 1.5
    """lambda of the threshold; the larger, the less is taken from Right."""

    n_way: ClassVar[bool] = False
    late = frozenset({"lam"})

    def __post_init__(self) -> None:
        if not isinstance(self.lam, int | float) or math.isnan(self.lam):
            raise ValueError(f"lam must be a number, it is {self.lam!r}")
        object.__setattr__(self, "lam", float(self.lam))

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        left, right = models
        return importance(left, right)

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        left, right = models
        S = measured
        return torch.where(threshold(S, self.lam) <= S, right, left)


def importance(left: Tensor, right: Tensor) -> Tensor:
    """S = KL(Right || Left) by row times |Left - Right|, float64, of the shape of `left`."""
    columns = row_length(left)
    x, y = right.reshape(-1, columns), left.reshape(-1, columns)
    S = torch.empty(x.shape, dtype=torch.float64, device=left.device)
    rows = max(1, BLOCK // columns)
    for start in range(0, x.shape[0], rows):
        block = slice(start, start + rows)
        p, q = x[block].double(), y[block].double()
        S[block] = row_kl(p, q)[:, None] * (p - q).abs()
    return S.reshape(left.shape)


def row_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(softmax(x) || softmax(y)) of each row, accurate however small it is.

    With d = x - y and p = softmax(x):

        KL = sum p (d + expm1(-d)) + log1p(s) - s,   s = sum p expm1(-d)

    where nothing large cancels while d is small. Rows with large differences take the usual
    sum p (log p - log q), which is accurate there and cannot overflow.

    Args:
        x, y: float64 [R, C]

    Returns:
        float64 [R], never negative
    """
    d = x - y
    p = torch.softmax(x, dim=-1)
    s = (p * torch.expm1(-d)).sum(dim=-1)
    near = (p * _d_plus_expm1(d)).sum(dim=-1) + (torch.log1p(s) - s)
    far = (p * (torch.log_softmax(x, dim=-1) - torch.log_softmax(y, dim=-1))).sum(dim=-1)
    return torch.where(d.abs().amax(dim=-1) < NEAR, near, far).clamp_min(0.0)


def _d_plus_expm1(d: Tensor) -> Tensor:
    """d + expm1(-d), by its series d^2/2 - d^3/6 + ... where the sum would cancel."""
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
    return torch.where(d.abs() < 1e-2, series, d + torch.expm1(-d))


def threshold(S: Tensor, lam: float) -> float:
    """T = median + lam * (Q3 - Q1); the quantile q of n values is element floor(q (n - 1)) of them sorted."""
    if math.isinf(lam):
        return lam
    if not S.numel():
        return math.inf
    values = S.flatten().cpu().numpy()
    places = [math.floor(q * (values.size - 1)) for q in (0.25, 0.5, 0.75)]
    q1, median, q3 = np.partition(values, places)[places]
    return float(median + lam * (q3 - q1))
