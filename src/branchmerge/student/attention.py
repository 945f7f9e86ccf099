"""Attention over a packed row that never crosses from one document to the next.

The model gets `cu_seq_lens` and no mask. flash-attn reads them by itself; `packed_sdpa` below serves every device
without a T x T mask and without work between documents: on CUDA in half precision one call of torch's own
FlashAttention for the whole row, elsewhere one causal SDPA call a document.

Shapes: B batch (1), H heads, G key/value heads, T tokens, E head size, D documents.
"""

import importlib.util
import inspect
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from branchmerge.student.autocast import compute_dtype

PACKED_SDPA = "packed_sdpa"


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, in the form transformers calls.

    Args:
        query: [1, H, T, E]; key and value: [1, G, T, E].
        cu_seq_lens_q: int32 [D + 1], where the documents begin and end.

    Returns:
        [1, T, H, E]

    Raises:
        ValueError: on what this cannot compute: no cu_seq_lens, a mask, a window shorter than a document, soft-capping.
    """
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention takes one row with cu_seq_lens and without attention_mask")
    dropout = dropout if module.training else 0.0
    if max_length_q is not None and softcap is None and not dropout and _takes_varlen(query):
        window = (-1 if sliding_window is None else sliding_window - 1, 0)  # so many tokens back, none ahead
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling, window), None
    if softcap is not None or (sliding_window is not None and (max_length_q or 0) > sliding_window):
        raise ValueError(
            f"attn=sdpa has neither soft-capping ({softcap}) nor a window ({sliding_window}) shorter than a document"
            f" ({max_length_q} tokens); use attn=flash_attention_2"
        )
    grouped = key.shape[1] != query.shape[1]
    bounds = cu_seq_lens_q.tolist()
    parts = [
        scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end],
            dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped,
        )
        for start, end in pairwise(bounds)
    ]  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _takes_varlen(query: Tensor) -> bool:
    """Whether torch's FlashAttention for rows of several documents is there: half precision on Ampere or later."""
    half = compute_dtype(query) in (torch.bfloat16, torch.float16)
    there = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return half and there and {"scale", "window_size"} <= _varlen_parameters()


@cache
def _varlen_parameters() -> frozenset[str]:
    """What this torch's varlen_attn can be told: 2.10 knew neither scale nor window, later ones ask about groups."""
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    window: tuple[int, int],
) -> Tensor:
    """[1, H, T, E] and [1, G, T, E] -> [1, T, H, E]."""
    q, k, v = (heads[0].transpose(0, 1).to(compute_dtype(query)) for heads in (query, key, value))
    grouped: dict[str, Any] = {"enable_gqa": k.shape[1] != q.shape[1]} if "enable_gqa" in _varlen_parameters() else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=window, **grouped)
    assert isinstance(out, Tensor)
    return out[None]


def _no_mask(*_: Any, **__: Any) -> None:
    """Where a document ends is told by cu_seq_lens, so transformers shall build no mask."""


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _no_mask)


def implementation(attn: str, device: torch.device) -> str:
    """The attention that transformers shall use for `backbone.attn` on a device."""
    if attn == "auto":
        flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
        attn = "flash_attention_2" if flash else "sdpa"
    return PACKED_SDPA if attn == "sdpa" else attn
