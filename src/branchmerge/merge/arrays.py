"""Weights as the merge holds them: numpy arrays of the stored values, which torch can view as tensors.

bfloat16 in numpy comes from ml_dtypes. An array and its tensor share their memory. Importing torch takes a second, so
it is imported only where it is needed; Arcee Fusion on a CPU does not need it.
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
"""numpy dtypes by their names in safetensors headers"""
CODES = {dtype: code for code, dtype in DTYPES.items()}


def is_floating(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == BFLOAT16


def as_tensor(weights: Weights) -> Tensor:
    """A tensor over the same memory; tensors are returned as they are."""
    import torch

    if not isinstance(weights, np.ndarray):
        return weights
    if weights.dtype == BFLOAT16:
        return torch.from_numpy(weights.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(weights)


def as_array(weights: Weights) -> Array:
    """An array over the same memory, copied from another device if need be; arrays are returned as they are."""
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
    """Whether an array may share memory with one of the others."""
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
    """Weights in another dtype (numpy's or torch's, as theirs), rounded to nearest; unchanged if they have it
    already."""
    old: Any = weights
    if old.dtype == dtype:
        return weights
    if isinstance(old, np.ndarray):  # by torch, which uses all threads
        return as_array(as_tensor(old).to(torch_dtype(dtype)))  # type: ignore[return-value]
    return old.to(dtype)


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch dtype of a numpy dtype."""
    return as_tensor(np.empty(0, dtype)).dtype


def bits(array: Array) -> Array:
    """The array in the form that the compiled loops take: bfloat16 as its bits, others unchanged."""
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


def row_length(weights: Weights) -> int:
    """Elements of a row, the last dimension; a vector is one row. At least 1."""
    return max(weights.shape[-1], 1) if weights.ndim else 1
