"""Sums over large tensors, block by block: in float64, without a float64 copy of a tensor."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Elements of each tensor in float64 at once: 8 MB."""


ROW = 4096
"""Elements in one partial sum of `summed`."""


def blocks(tensors: Sequence[Tensor], row: int = 1) -> Iterator[tuple[slice, list[Tensor]]]:
    """Walk over tensors of one shape together, in pieces of whole rows.

    Args:
        tensors: of one shape and any floating-point dtype
        row: length of a row, whose elements stay in one block; 1 if rows do not matter

    Yields:
        The slice of the flat tensor, and the block of each tensor there: float64, flat.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    step = max(BLOCK // row, 1) * row
    for start in range(0, flat[0].numel(), step):
        place = slice(start, start + step)
        yield place, [tensor[place].double() for tensor in flat]


def room_for(tensors: Sequence[Tensor]) -> Tensor:
    """An empty flat result for tensors of one shape: float64 if one of them is, else float32."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.empty(tensors[0].numel(), dtype=dtype, device=tensors[0].device)


def gram(tensors: Sequence[Tensor], origin: Tensor | None = None) -> Tensor:
    """Inner products <W_i - O, W_j - O> of n tensors, added up in float64.

    Args:
        tensors: n tensors of one shape
        origin: O, of that shape too; None for zero

    Returns:
        float64 [n, n] on the CPU
    """
    n = len(tensors)
    total = torch.zeros(n, n, dtype=torch.float64)
    for _, parts in blocks([*tensors, *([] if origin is None else [origin])]):
        vectors = [part - parts[n] for part in parts[:n]] if origin is not None else parts
        for i in range(n):
            for j in range(i + 1):
                total[i, j] += summed(vectors[i] * vectors[j])
    return total + total.tril(-1).T


def summed(values: Tensor) -> float:
    """Sum of a flat tensor in an order that does not depend on the number of threads: by rows, then the rows' sums."""
    whole = values.numel() // ROW * ROW
    return float(values[:whole].view(-1, ROW).sum(1).sum() + values[whole:].sum())


def combination(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_i c_i W_i, added up in float64 and rounded once, to float32 unless a tensor is float64."""
    out = room_for(tensors)
    for place, parts in blocks(tensors):
        total = coefficients[0] * parts[0]
        for c, part in zip(coefficients[1:], parts[1:], strict=True):
            total += c * part
        out[place] = total
    return out.reshape(tensors[0].shape)
