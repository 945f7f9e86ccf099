"""Sums over large tensors, block by block: in float64, without a float64 copy of a tensor."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Elements of each tensor that are held in float64 at once: 8 MB."""


def blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Walk over tensors of one shape together: (place in the flat tensor, the float64 block of each)."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), BLOCK):
        place = slice(start, start + BLOCK)
        yield place, [tensor[place].double() for tensor in flat]


def combination(coefficients: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_i c_i W_i, added up in float64, rounded once to float32."""
    out = torch.empty(tensors[0].numel(), dtype=torch.float32, device=tensors[0].device)
    for place, parts in blocks(tensors):
        total = coefficients[0] * parts[0]
        for c, part in zip(coefficients[1:], parts[1:], strict=True):
            total += c * part
        out[place] = total
    return out.reshape(tensors[0].shape)
