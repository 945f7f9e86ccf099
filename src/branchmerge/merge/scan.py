"""One look over a tensor as it is stored: does it hold NaN, and how far is it from another."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from branchmerge.errors import UserError
from branchmerge.merge import kernels
from branchmerge.merge.anatomy_kernels import difference
from branchmerge.merge.threads import workers

BITS = {  # the integers of a float's size, and its exponent bits
    torch.bfloat16: (torch.uint16, np.uint16(0x7F80)),
    torch.float16: (torch.uint16, np.uint16(0x7C00)),
    torch.float32: (torch.uint32, np.uint32(0x7F800000)),
    torch.float64: (torch.uint64, np.uint64(0x7FF0000000000000)),
}


def has_special(tensor: Tensor) -> bool:
    """Whether a CPU tensor holds NaN or infinity."""
    integers, exponent = BITS[tensor.dtype]
    bits = tensor.contiguous().reshape(-1).view(integers).numpy()
    return any(workers.share(lambda part: kernels.special(bits[part], exponent), bits.size, 1))


@dataclass(frozen=True)
class Change:
    """From one tensor to another of its shape."""

    changed: int
    """Elements that differ"""
    norm: float
    """2-norm of the difference"""
    norm_before: float
    """2-norm of what was there"""
    elements: int

    @property
    def facts(self) -> dict[str, float]:
        """For the table of tensors."""
        share = self.changed / max(self.elements, 1)
        return {"changed": share, "update_norm": self.norm, "left_norm": self.norm_before}


def check_finite(tensor: Tensor, name: str, folder: Path) -> None:
    """Refuse a parent's tensor that holds NaN or infinity."""
    if has_special(tensor):
        raise UserError(f"{folder}: the tensor {name} holds NaN or infinity; that model is broken")


def changes(after: Tensor, before: Tensor) -> Change:
    """Compare two tensors of one shape."""
    if after.device.type != "cpu":
        return _changes_torch(after.reshape(-1), before.reshape(-1))
    a, b = (flat(tensor) for tensor in (after, before))
    # Parts of a fixed size: the sum must not depend on how many threads there are.
    parts = [slice(start, start + (1 << 22)) for start in range(0, a.size, 1 << 22)]
    found = workers.each(lambda part: difference(a[part], b[part]), parts)
    changed, squares, squares_before = (sum(column) for column in zip((0, 0.0, 0.0), *found, strict=True))
    return Change(changed, math.sqrt(squares), math.sqrt(squares_before), a.size)


def _changes_torch(after: Tensor, before: Tensor) -> Change:
    changed, squares, squares_before = 0, 0.0, 0.0
    for x, y in zip(after.split(1 << 22), before.split(1 << 22), strict=True):
        d = x.double() - y.double()
        changed += int(d.count_nonzero())
        squares += float((d * d).sum())
        squares_before += float((y.double() ** 2).sum())
    return Change(changed, math.sqrt(squares), math.sqrt(squares_before), after.numel())


def flat(tensor: Tensor) -> np.ndarray:
    """A tensor as one row for the compiled loops: bfloat16 as its bits, float16 as float32, others as stored."""
    tensor = tensor.contiguous().reshape(-1)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).numpy()
