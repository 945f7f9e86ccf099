"""KL of rows in torch, for every device and dtype: in float64, or with the rounding of other implementations."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK, DEVICE_BLOCK = 1 << 20, 1 << 24
"""Elements whose float64 temporaries exist at once: few enough for a CPU's caches, many enough to fill another
device."""


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
        kl[rows] = row_kl(x[rows], y[rows])
    return kl


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Cut [R, C] into blocks of rows."""
    step = max(1, _block(rows) // max(rows.shape[1], 1))
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _block(tensor: Tensor) -> int:
    return BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK


def row_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(softmax(x) || softmax(y)) of each row, accurate even where it is tiny.

    With p = softmax(x), d = x - y minus its mean under p (which changes neither softmax), g(d) = d + expm1(-d):

        KL = sum p g(d) + log1p(s) - s,   s = sum p expm1(-d)

    in which nothing large cancels. Only where s > 1 the usual sum p (log p - log q) is used. Rows longer than a block,
    such as a whole tensor as one row, are processed in pieces.

    Args:
        x, y: [R, C] of any floating-point dtype

    Returns:
        float64 [R], never negative
    """
    width = _block(x)
    in_x, in_y = _log_sum_exp(x, width), _log_sum_exp(y, width)
    mean = torch.zeros_like(in_x)
    for u, v in _pieces(x, y, width):
        mean += ((u - in_x).exp() * (u - v)).sum(dim=-1, keepdim=True)
    s, near = torch.zeros_like(mean), torch.zeros_like(mean)
    for u, v in _pieces(x, y, width):
        p, d = (u - in_x).exp(), (u - v) - mean
        # For large |d|, p may underflow where p exp(-d) = exp(v + mean - in_x) does not.
        t = torch.where(d.abs() < 0.5, p * torch.expm1(-d), (v + mean - in_x).clamp(max=700).exp() - p)
        series = p * d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
        s += t.sum(dim=-1, keepdim=True)
        near += torch.where(d.abs() < 1e-2, series, p * d + t).sum(dim=-1, keepdim=True)
    return torch.where(s > 1, in_y - in_x + mean, near + (torch.log1p(s) - s)).clamp_min(0.0).squeeze(-1)


def _pieces(x: Tensor, y: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of columns of x and y, in float64."""
    for u, v in zip(x.split(width, dim=-1), y.split(width, dim=-1), strict=True):
        yield u.double(), v.double()


def _log_sum_exp(x: Tensor, width: int) -> Tensor:
    """[R, C] -> float64 [R, 1]."""
    parts = [part.double().logsumexp(dim=-1, keepdim=True) for part in x.split(width, dim=-1)]
    return torch.cat(parts, dim=-1).logsumexp(dim=-1, keepdim=True)


def rounded_kl(x: Tensor, y: Tensor, dtype: torch.dtype, epsilon: float = 1e-8) -> Tensor:
    """The KL in the usual way: softmax and logarithm in a low-precision dtype, epsilon added to both softmaxes."""
    p, q = (torch.softmax(tensor.to(dtype), dim=-1) + epsilon for tensor in (x, y))
    return (p * torch.log(p / q)).sum(dim=-1)
