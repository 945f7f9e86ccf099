"""One look over a tensor as it is stored: does it hold NaN, and how far is it from another."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from branchmerge.errors import UserError
from branchmerge.merge import kernels
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


def check_finite(tensor: Tensor, name: str, folder: Path) -> None:
    """Refuse a parent's tensor that holds NaN or infinity."""
    if has_special(tensor):
        raise UserError(f"{folder}: the tensor {name} holds NaN or infinity; that model is broken")


def changes(merged: Tensor, left: Tensor) -> tuple[int, float]:
    """In how many elements two CPU tensors differ, and the 2-norm of their difference."""
    a, b = (_flat(tensor) for tensor in (merged, left))
    # Parts of a fixed number: the sum must not depend on how many threads there are.
    parts = [slice(start, start + (1 << 22)) for start in range(0, a.size, 1 << 22)]
    found = workers.each(lambda part: kernels.difference(a[part], b[part]), parts)
    return sum(changed for changed, _ in found), math.sqrt(sum(squares for _, squares in found))


def _flat(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous().reshape(-1)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).numpy()
