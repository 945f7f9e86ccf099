"""FlashAttention for packed rows, by the packages flash-attn (version 2), flash_attn_3 (3) and flash-attn-4 (4).

Shapes: H heads, G key/value heads, T tokens, E head size, D documents.
"""

import importlib
import inspect
from typing import Any

from torch import Tensor
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from branchmerge.student import flash4

VERSIONS = (2, 3, 4)
MODULES = {2: "flash_attn", 3: "flash_attn_interface"}
WIDEST = 256
"""Largest head size of versions 2 and 3, and of torch's own FlashAttention, which is version 2"""
_FOUND: dict[int, tuple[Any, frozenset[str]]] = {}


def is_installed(version: int) -> bool:
    """Whether this version is installed and works on this machine."""
    found = {2: is_flash_attn_2_available, 3: is_flash_attn_3_available, 4: flash4.is_installed}
    return bool(found[version]())


def takes(version: int, query: Tensor, value: Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether there should be kernels for these heads, window and cap; `trials.choose_attention` tries them."""
    if version == 4:
        return window is None and softcap is None and flash4.takes(query, value)
    asked = {name for name, limit in (("window_size", window), ("softcap", softcap)) if limit is not None}
    return flash4.fits(query, value, WIDEST) and (not asked or asked <= _found(version)[1])


def attend(
    version: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each document.

    Args:
        query: [T, H, E] in bfloat16 or float16, on a GPU; key and value: [T, G, E].
        bounds: int32 [D + 1], the boundaries of the documents.
        longest: tokens of the longest document.
        window: tokens that each token attends to, itself included; versions 2 and 3.
        softcap: scores s become softcap tanh(s / softcap); versions 2 and 3.

    Returns:
        [T, H, E]
    """
    if version == 4:
        return flash4.attend(query, key, value, bounds, longest, scale)
    limits: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}  # tokens back and ahead
    if softcap is not None:
        limits["softcap"] = softcap
    function, _ = _found(version)
    out = function(
        query, key, value, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=True, **limits,
    )  # fmt: skip
    result: Tensor = out[0] if isinstance(out, tuple) else out  # some versions return the log-sum-exp too
    return result


def _found(version: int) -> tuple[Any, frozenset[str]]:
    """The function and the names of its parameters: flash-attn 2.2 has no window, 2.5 no cap.

    The trial before training fills the cache, since compiled code cannot import.
    """
    if version not in _FOUND:
        function = importlib.import_module(MODULES[version]).flash_attn_varlen_func
        _FOUND[version] = function, frozenset(inspect.signature(function).parameters)
    return _FOUND[version]
