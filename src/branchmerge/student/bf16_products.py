"""bfloat16 matrix products at float32's speed, on a CPU without instructions for them.

On such a CPU torch multiplies bfloat16 one number at a time, about ten times slower than float32. A product of bfloat16
matrices is accumulated in float32 and rounded once; so the fast product of float32 copies, rounded, is the same except
for the order of summation. Copies are cheap compared with products.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu_backward")
"""Operators of a training that are slow with bfloat16 on such a CPU; attention's forward pass is not."""


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Inside, this process computes bfloat16 `PRODUCTS` on the CPU with float32 copies; in backward passes too."""
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
            for name in PRODUCTS:
                kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
                library.impl(name, _in_float32(kernel), "CPU", with_keyset=True, allow_override=True)
        yield
    finally:
        library._destroy()


def _in_float32(kernel: Any) -> Callable[..., Any]:
    def product(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(_is_narrow(arg) for arg in args):
            return kernel.call_boxed(keys, *args, **kwargs)
        named = {name: _wide(value) for name, value in kwargs.items()}
        return _narrow(kernel.call_boxed(keys, *map(_wide, args), **named))

    return product


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _wide(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value


def _narrow(result: Any) -> Any:
    """The result, or each of several results, in bfloat16."""
    return result.bfloat16() if isinstance(result, Tensor) else tuple(each.bfloat16() for each in result)
