"""One pass over a tensor as it is stored: does it hold NaN or infinity, and how much does it differ from another."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from branchmerge.errors import UserError
from branchmerge.merge import kernels
from branchmerge.merge.anatomy_kernels import difference
from branchmerge.merge.arrays import BFLOAT16, FLOAT16, FLOAT32, Array, Weights, as_array, as_tensor, bits, on_cpu
from branchmerge.merge.threads import workers

if TYPE_CHECKING:
    from torch import Tensor

EXPONENT: dict[np.dtype[Any], Any] = {  # a float's exponent bits
    BFLOAT16: np.uint16(0x7F80),
    FLOAT16: np.uint16(0x7C00),
    FLOAT32: np.uint32(0x7F800000),
    np.dtype(np.float64): np.uint64(0x7FF0000000000000),
}


def has_special(array: Array) -> bool:
    """Whether an array holds NaN or infinity."""
    exponent = EXPONENT[array.dtype]
    integers = np.ascontiguousarray(array).reshape(-1).view(exponent.dtype)
    return any(workers.share(lambda part: kernels.special(integers[part], exponent), integers.size, 1))


@dataclass(frozen=True)
class Change:
    """The change from one tensor to another of the same shape."""

    changed: int
    """Elements that differ"""
    norm: float
    """2-norm of the difference"""
    norm_before: float
    """2-norm of the tensor before the change"""
    elements: int

    @property
    def facts(self) -> dict[str, float]:
        """As in tensors.json."""
        share = self.changed / max(self.elements, 1)
        return {"changed": share, "update_norm": self.norm, "left_norm": self.norm_before}


def check_finite(array: Array, name: str, folder: Path) -> None:
    """Refuse a parent's tensor that holds NaN or infinity."""
    if has_special(array):
        raise UserError(f"{folder}: the tensor {name} holds NaN or infinity; that model is broken")


def changes(after: Weights, before: Weights) -> Change:
    """Compare two tensors of one shape."""
    if not on_cpu(after):
        return _changes_torch(as_tensor(after).reshape(-1), as_tensor(before).reshape(-1))
    a, b = (flat(as_array(weights)) for weights in (after, before))
    # Parts of a fixed size, so that the sum does not depend on the number of threads.
    parts = [slice(start, start + (1 << 22)) for start in range(0, a.size, 1 << 22)]
    found = workers.each(lambda part: difference(a[part], b[part]), parts)
    changed, squares, squares_before = (sum(column) for column in zip((0, 0.0, 0.0), *found, strict=True))
    return Change(changed, math.sqrt(squares), math.sqrt(squares_before), a.size)


def _changes_torch(after: "Tensor", before: "Tensor") -> Change:
    changed, squares, squares_before = 0, 0.0, 0.0
    for x, y in zip(after.split(1 << 22), before.split(1 << 22), strict=True):
        d = x.double() - y.double()
        changed += int(d.count_nonzero())
        squares += float((d * d).sum())
        squares_before += float((y.double() ** 2).sum())
    return Change(changed, math.sqrt(squares), math.sqrt(squares_before), after.numel())


def flat(array: Array) -> Array:
    """An array as one row for the compiled loops: bfloat16 as its bits, float16 as float32, others as stored."""
    array = np.ascontiguousarray(array).reshape(-1)
    return array.astype(FLOAT32) if array.dtype == FLOAT16 else bits(array)
