"""KL of rows in torch, for every device and dtype: in float64, or rounded as others do it."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Elements whose float64 temporaries are held at once."""


def kl_of_rows(x: Tensor, y: Tensor, precision: str = "float64") -> Tensor:
    """KL(softmax(x) || softmax(y)) of each row.

    Args:
        x, y: [R, C] of one floating-point dtype
        precision: float32 or bfloat16 for `rounded_kl` in that dtype; anything else for `row_kl`

    Returns:
        float64 [R], on their device
    """
    if precision in ("float32", "bfloat16"):
        return rounded_kl(x, y, getattr(torch, precision)).double()
    kl = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for rows in row_blocks(x):
        kl[rows] = row_kl(x[rows].double(), y[rows].double())
    return kl


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Cut [R, C] into blocks of rows."""
    step = max(1, BLOCK // max(rows.shape[1], 1))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def row_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(softmax(x) || softmax(y)) of each row, accurate however small it is.

    With p = softmax(x), d = x - y less its mean under p (which changes neither softmax), g(d) = d + expm1(-d):

        KL = sum p g(d) + log1p(s) - s,   s = sum p expm1(-d)

    where nothing large cancels. Only where s > 1 is the usual sum p (log p - log q) taken.

    Args:
        x, y: float64 [R, C]

    Returns:
        float64 [R], never negative
    """
    log_Z = torch.logsumexp(x, dim=-1, keepdim=True)
    p = (x - log_Z).exp()
    mean = (p * (x - y)).sum(dim=-1, keepdim=True)
    d = (x - y) - mean
    # Far elements: p alone may underflow where p exp(-d) = exp(y + mean - log Z) does not.
    t = torch.where(d.abs() < 0.5, p * torch.expm1(-d), (y + mean - log_Z).clamp(max=700).exp() - p)
    series = p * d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
    s = t.sum(dim=-1)
    near = torch.where(d.abs() < 1e-2, series, p * d + t).sum(dim=-1) + (torch.log1p(s) - s)
    far = (torch.logsumexp(y, dim=-1, keepdim=True) - log_Z + mean).squeeze(-1)
    return torch.where(s > 1, far, near).clamp_min(0.0)


def rounded_kl(x: Tensor, y: Tensor, dtype: torch.dtype, epsilon: float = 1e-8) -> Tensor:
    """The same in the usual way, softmax and logarithm in a low-precision dtype, with epsilon added to both."""
    p, q = (torch.softmax(tensor.to(dtype), dim=-1) + epsilon for tensor in (x, y))
    return (p * torch.log(p / q)).sum(dim=-1)
