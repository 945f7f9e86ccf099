"""FlashAttention 4 (the package flash-attn-4) for packed rows, as a custom operator that torch.compile does not trace.

transformers' own integration breaks the graph of a compiled layer at the attention, and leaves most layers uncompiled:
it passes the index of the layer on, and each index requires another compilation.

Shapes: H heads, G key/value heads, T tokens, E head size, D documents.
"""

import importlib
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_flash_attn_4_available

WIDEST = 128
"""Largest head size with kernels on both Hopper and Blackwell, forward and backward"""
ASKED = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"}


@cache
def is_installed() -> bool:
    """Whether a version is installed whose kernels take the arguments used here; the package has no stable release."""
    if not is_flash_attn_4_available():
        return False
    try:
        package = _package()
    except Exception:  # of any kind: CUDA libraries are missing (flash-attn-4[cu13] has them), or versions differ
        return False
    kernels = (getattr(package, name, None) for name in ("_flash_attn_fwd", "_flash_attn_bwd"))
    return all(kernel and inspect.signature(kernel).parameters.keys() >= ASKED for kernel in kernels)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether there should be kernels for heads of this size; `trials.choose_attention` tries them."""
    return fits(query, value, WIDEST)


def fits(query: Tensor, value: Tensor, widest: int) -> bool:
    """Whether all versions of FlashAttention with kernels up to a head size of `widest` support these heads."""
    size = query.shape[-1]
    return size <= widest and size % 8 == 0 and value.shape[-1] == size


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside each document.

    Args:
        query: [T, H, E] in bfloat16 or float16, on a GPU of compute capability 9 or later; key and value: [T, G, E].
        bounds: int32 [D + 1], the boundaries of the documents.
        longest: tokens of the longest document.

    Returns:
        [T, H, E]
    """
    q, k, v = (heads.contiguous() for heads in (query, key, value))
    out, _ = torch.ops.branchmerge.flash4(q, k, v, bounds, longest, scale)
    assert isinstance(out, Tensor)
    return out


@torch.library.custom_op("branchmerge::flash4", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The result, and the log-sum-exp of each token's scores: float32 [H, T]."""
    # The public function does not return what the gradient needs. Newer versions return more than these two.
    out, lse, *_ = _package()._flash_attn_fwd(query, key, value, **_asked(bounds, longest, scale), return_lse=True)
    return out, lse


@_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("branchmerge::flash4_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _package()._flash_attn_bwd(query, key, value, out, grad, lse, **_asked(bounds, longest, scale))
    return grads[0], grads[1], grads[2]


@_backward.register_fake
def _(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bounds, *numbers = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)
    ctx.numbers = numbers
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.branchmerge.flash4_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return *found, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _asked(bounds: Tensor, longest: int, scale: float | None) -> dict[str, Any]:
    """Arguments that both kernels share."""
    return {
        "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest,
        "softmax_scale": scale, "causal": True,
    }  # fmt: skip


@cache
def _package() -> Any:
    return importlib.import_module("flash_attn.cute.interface")
