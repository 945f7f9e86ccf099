"""Weights as the merge holds them: numpy arrays of what is stored, which torch can look at as tensors.

numpy has no bfloat16 of its own, ml_dtypes gives it one. An array and its tensor share their memory. torch takes a
second to import, so that is left to the moment something needs it: Arcee Fusion on a CPU does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = NDArray[Any]
Weights: TypeAlias = Union[Array, "Tensor"]
"""An array, or a tensor on any device"""
W = TypeVar("W", bound=Weights)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
DTYPES = {
    "F64": np.dtype(np.float64), "F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16,
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool),
}  # fmt: skip
"""By their names in safetensors' headers"""
CODES = {dtype: code for code, dtype in DTYPES.items()}


def is_floating(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def as_tensor(weights: Weights) -> Tensor:
    """The same memory as a tensor; tensors as they are."""
    import torch

    if not isinstance(weights, np.ndarray):
        return weights
    if weights.dtype == BFLOAT16:
        return torch.from_numpy(weights.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(weights)


def as_array(weights: Weights) -> Array:
    """The same memory as an array, that of a tensor on another device copied; arrays as they are."""
    if isinstance(weights, np.ndarray):
        return weights
    import torch

    tensor = weights.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(BFLOAT16)
    return tensor.numpy()


def on_cpu(weights: Weights) -> bool:
    return isinstance(weights, np.ndarray) or weights.device.type == "cpu"


def shares_memory(array: Array, others: Iterable[Weights]) -> bool:
    """Whether an array may lie where one of the others does."""
    return any(isinstance(other, np.ndarray) and np.may_share_memory(array, other) for other in others)


def promoted(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The smallest floating-point dtype that holds all values of the given ones."""
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    return reduce(np.promote_types, different - {BFLOAT16, FLOAT16}, FLOAT32)


def in_one_dtype(weights: list[Any]) -> list[Any]:
    """All arrays, or all tensors, in the smallest dtype that holds their values."""
    if all(isinstance(entry, np.ndarray) for entry in weights):
        dtype: Any = promoted(entry.dtype for entry in weights)
    else:
        import torch

        dtype = reduce(torch.promote_types, (entry.dtype for entry in weights))
    return [converted(entry, dtype) for entry in weights]


def converted(weights: W, dtype: Any) -> W:
    """Weights in another dtype of their kind, rounded to the nearest; as they are where they have it."""
    old: Any = weights
    if old.dtype == dtype:
        return weights
    if isinstance(old, np.ndarray):  # torch rounds them with all threads
        return as_array(as_tensor(old).to(torch_dtype(dtype)))  # type: ignore[return-value]
    return old.to(dtype)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """torch's name of a numpy dtype."""
    return as_tensor(np.empty(0, dtype)).dtype


def bits(array: Array) -> Array:
    """What the compiled loops take: bfloat16 as its bits, others as they are."""
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


def row_length(weights: Weights) -> int:
    """Elements of a row, the last dimension; a vector is one row. At least 1."""
    return max(weights.shape[-1], 1) if weights.ndim else 1
