"""FlashAttention of the packages flash-attn (2), flash_attn_3 (3) and flash-attn-4 (4) for packed rows.

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
"""Head size up to which versions 2 and 3 have kernels, as torch's own, which is 2"""
_FOUND: dict[int, tuple[Any, frozenset[str]]] = {}


def is_installed(version: int) -> bool:
    """Whether this version is there, for this machine."""
    found = {2: is_flash_attn_2_available, 3: is_flash_attn_3_available, 4: flash4.is_installed}
    return bool(found[version]())


def takes(version: int, query: Tensor, value: Tensor, window: int | None, softcap: float | None) -> bool:
    """Whether it should have kernels for such heads, a window and a cap; `trials.choose_attention` tries them."""
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
        bounds: int32 [D + 1], where the documents begin and end.
        longest: tokens of the longest document.
        window: tokens that each one sees, itself included; versions 2 and 3.
        softcap: scores s become softcap tanh(s / softcap); versions 2 and 3.

    Returns:
        [T, H, E]
    """
    if version == 4:
        return flash4.attend(query, key, value, bounds, longest, scale)
    limits: dict[str, Any] = {} if window is None else {"window_size": (window - 1, 0)}  # so many back, none ahead
    if softcap is not None:
        limits["softcap"] = softcap
    function, _ = _found(version)
    out = function(
        query, key, value, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=True, **limits,
    )  # fmt: skip
    result: Tensor = out[0] if isinstance(out, tuple) else out  # some versions give the scores' logarithms too
    return result


def _found(version: int) -> tuple[Any, frozenset[str]]:
    """The function and the names of its parameters: 2.2 knew no windows, 2.5 no caps.

    Looked up by the trial, as what is compiled can import nothing.
    """
    if version not in _FOUND:
        function = importlib.import_module(MODULES[version]).flash_attn_varlen_func
        _FOUND[version] = function, frozenset(inspect.signature(function).parameters)
    return _FOUND[version]
