"""Attention over a packed row that never crosses from one document to the next.

The model gets `cu_seq_lens` and no mask. `packed_sdpa` below works on every device, without a T x T mask and without
computing scores between documents: on CUDA in half precision by one FlashAttention call for the whole row, elsewhere by
one causal SDPA call per document. Torch's own FlashAttention cannot cap scores, and SDPA supports no window either: for
these, CUDA uses FlexAttention, and a CPU the formula, one document at a time. The variants in `PACKED_FLASH` use
FlashAttention 2, 3 or 4 of its package in place of torch's, if that supports the heads, the window and the cap.

Shapes: B batch (1), H heads, G key/value heads, T tokens, E head size, D documents.
"""

import inspect
from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from branchmerge.errors import UserError
from branchmerge.student import flash, flash4
from branchmerge.student.autocast import compute_dtype
from branchmerge.student.compiling import allow_many_compilations
from branchmerge.student.context_parallel import RowParts

PACKED_SDPA = "packed_sdpa"
PACKED_FLASH = {version: f"{PACKED_SDPA}_fa{version}" for version in flash.VERSIONS}
"""Names by version; transformers gives an attention with "sdpa" in its name to models that support SDPA."""
SHORT = 512
"""Document length in tokens up to which a CPU's attention is faster in float32 than in bfloat16: by a tenth, for very
short documents three times as fast (docs/log.md, 2026-11-27)"""


BLOCK = 128
"""Queries, and keys, in a block of FlexAttention"""


class PackedRowError(ValueError):
    """The attention was called with something other than a packed row."""

    def __init__(self, why: str = "") -> None:
        super().__init__(why or "packed attention takes one row with cu_seq_lens and without attention_mask")


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
    row_parts: RowParts | None = None,
    s_aux: Tensor | None = None,
    version: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, with the signature that transformers calls.

    Args:
        query: [1, H, T, E]; key and value: [1, G, T, E].
        cu_seq_lens_q: int32 [D + 1], the boundaries of the documents.
        row_parts: how the row is split over several devices; T is then the number of tokens on this device.
        version: the FlashAttention package to use in place of torch's own.

    Returns:
        [1, T, H, E]

    Raises:
        PackedRowError: not a packed row: no cu_seq_lens, a mask, several rows, or keys of a cache.
        UserError: the model has attention sinks (`s_aux`).
    """
    if s_aux is not None:
        raise UserError(f"{type(module).__name__}: attention with sinks cannot train here; take another kind of model")
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise PackedRowError
    if key.shape[2] != query.shape[2]:
        raise PackedRowError(f"packed attention takes no cache: {key.shape[2]} keys for {query.shape[2]} queries")
    dropout = dropout if module.training else 0.0
    attend = partial(
        _attend, bounds=cu_seq_lens_q, longest=max_length_q, scale=scaling, window=sliding_window, softcap=softcap,
        dropout=dropout, version=version,
    )  # fmt: skip
    if row_parts is None:
        return attend(query, key, value), None
    return row_parts.all_heads(attend(*row_parts.some_heads(query, key, value))), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout: float,
    version: int | None,
) -> Tensor:
    """Dispatch by device, heads and limits of scores; [1, H, T, E] and [1, G, T, E] -> [1, T, H, E]."""
    heads = (query, key, value)
    if longest is not None and not dropout and _has_flash_attention(query):
        if version is not None and flash.takes(version, query, value, window, softcap):
            return flash.attend(version, *_tokens_first(*heads), bounds, longest, scale, window, softcap)[None]
        if softcap is None and _takes_varlen(query, value):
            return _varlen(*heads, bounds, longest, scale, window)
    limited = softcap is not None or (window is not None and (longest or query.shape[2]) > window)
    if limited and query.is_cuda and not dropout:
        return _flex(*heads, bounds, scale, window, softcap)
    if limited:
        attend = partial(by_formula, scale=scale, window=window, softcap=softcap, dropout=dropout)
    else:
        attend = partial(_causal, scale=scale, dropout=dropout)
    parts = [_document(attend, *(each[:, :, start:end] for each in heads)) for start, end in pairwise(bounds.tolist())]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _document(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one document, in the dtype of the products; computed in float32 where that is faster."""
    compute = compute_dtype(query)
    if query.device.type != "cpu" or query.shape[2] > SHORT or compute == torch.float32:
        return attend(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return attend(query.float(), key.float(), value.float()).to(compute)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float = 0.0) -> Tensor:
    """torch's attention over one document."""
    if query.is_cuda:  # without FlashAttention for such heads, SDPA with fewer heads of keys would hold all scores
        key, value = _for_each_query(query, key, value)
    grouped = key.shape[1] != query.shape[1]
    return scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
    )


def _for_each_query(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated for each head of the queries: twice [1, G, T, E] -> twice [1, H, T, E]."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _has_flash_attention(query: Tensor) -> bool:
    """Whether this device and precision support FlashAttention at all, torch's or a package's."""
    half = compute_dtype(query) in (torch.bfloat16, torch.float16)
    return half and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's own FlashAttention supports such heads, and this torch the arguments that packed rows need."""
    return flash4.fits(query, value, flash.WIDEST) and {"scale", "window_size"} <= _varlen_parameters()


@cache
def _varlen_parameters() -> frozenset[str]:
    """Parameters of this torch's varlen_attn: 2.10 has neither scale nor window, later versions require enable_gqa."""
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Torch's own FlashAttention; [1, H, T, E] and [1, G, T, E] -> [1, T, H, E]."""
    span = (-1 if window is None else window - 1, 0)  # tokens back (-1: all) and ahead
    q, k, v = _tokens_first(query, key, value)
    grouped: dict[str, Any] = {"enable_gqa": k.shape[1] != q.shape[1]} if "enable_gqa" in _varlen_parameters() else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=span, **grouped)
    assert isinstance(out, Tensor)
    return out[None]


def _tokens_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, H, T, E] and [1, G, T, E] -> [T, H, E] and [T, G, E], in the dtype of the products."""
    q, k, v = (heads[0].transpose(0, 1).to(compute_dtype(query)) for heads in (query, key, value))
    return q, k, v


def by_formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(cap(Q K^T scale)) V of one document; each token attends to itself and up to window - 1 before it.

    Args:
        softcap: scores s become softcap tanh(s / softcap).

    Returns:
        [1, H, T, E]
    """
    key, value = _for_each_query(query, key, value)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(query.shape[2], device=query.device)
    back = place[:, None] - place
    seen = (back >= 0) & (back < (window or len(place)))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.dropout(weights, dropout, dropout > 0) @ value


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """FlexAttention; [1, H, T, E] and [1, G, T, E] -> [1, T, H, E]."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    q, k, v = (heads.to(compute_dtype(query)) for heads in (query, key, value))
    grouped = k.shape[1] != q.shape[1]
    blocks = _blocks(bounds, query.shape[2], window)
    out = _compiled_flex(query.is_cuda)(q, k, v, capped, blocks, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@lru_cache(maxsize=4)
def _blocks(bounds: Tensor, tokens: int, window: int | None) -> BlockMask:
    """Which blocks of scores are computed whole, and which in part.

    Found from the first and last token of each block: `create_block_mask` would evaluate all T x T scores. Cached, as
    all layers of a step pass the same `bounds`, and tensors hash by identity.
    """
    document = torch.bucketize(torch.arange(tokens, device=bounds.device), bounds[1:], right=True)

    def seen(_: Tensor, __: Tensor, at: Tensor, other: Tensor) -> Tensor:
        inside = (document[at] == document[other]) & (at >= other)
        return inside if window is None else inside & (at - other < window)

    first = torch.arange(0, tokens, BLOCK, device=bounds.device)
    last = (first + BLOCK - 1).clamp(max=tokens - 1)
    q_first, q_last, back = first[:, None], last[:, None], window or tokens
    before = last < q_first
    some = before & (document[last] == document[q_first]) & (q_first - last < back) | (first == q_first)
    whole = before & (document[first] == document[q_last]) & (q_last - first < back) & (q_first + BLOCK <= tokens)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """bool [rows, columns] -> int32 [1, 1, rows], the count in each row; [1, 1, rows, columns], their columns first."""
    places = wanted.int().argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(dim=-1, dtype=torch.int32)[None, None], places.int()[None, None]


@cache
def _compiled_flex(compiled: bool) -> Any:
    """flex_attention; uncompiled only on a CPU, as a check, since it then holds all scores in memory."""
    allow_many_compilations()
    return torch.compile(flex_attention) if compiled else flex_attention


def refuse_what_is_not_packed(model: nn.Module, _: Any, given: dict[str, Any]) -> None:
    """A forward pre-hook that raises PackedRowError on inputs that would silently give wrong attention.

    These are a mask, which transformers would drop; no boundaries of documents, as transformers' own attention would
    take the row for one document; and a cache, with which transformers ignores the boundaries.
    """
    if given.get("attention_mask") is not None or given.get("cu_seq_lens_q") is None:
        raise PackedRowError
    cache = given.get("use_cache")
    config: Any = model.config
    if getattr(config, "use_cache", False) if cache is None else cache:
        raise PackedRowError("packed rows take no cache: call the model with use_cache=False")


# Not in AttentionMaskInterface: transformers would then check on the device, for each row, whether it is packed.
AttentionInterface.register(PACKED_SDPA, packed_sdpa)
for version, name in PACKED_FLASH.items():
    AttentionInterface.register(name, partial(packed_sdpa, version=version))


def implementation(attn: str, device: torch.device, compute: torch.dtype, shared: bool = False) -> str:
    """The name of the attention that transformers should use for `backbone.attn` on a device.

    Args:
        compute: dtype of the matrix products
        shared: each row is split over several devices
    """
    half = compute in (torch.bfloat16, torch.float16)
    if attn == "sdpa" or (attn == "auto" and (device.type != "cuda" or not half or shared)):
        return PACKED_SDPA
    if attn == "auto":
        return _newest_flash_attention(device)
    if not half:
        raise UserError(
            f"backbone.attn={attn}: it has no float32; set trainer.precision=bf16-mixed or backbone.attn=sdpa"
        )
    version = int(attn.removeprefix("flash_attention_"))
    if not flash.is_installed(version):
        package = "the package flash-attn-4" if version == 4 else "that version of flash-attn"
        install = " pip install 'flash-attn-4[cu13]', or" if version == 4 else ""
        raise UserError(
            f"backbone.attn={attn}: {package} is not installed here, not whole, or not known;{install} leave it out"
        )
    return PACKED_FLASH[version]


def _newest_flash_attention(device: torch.device) -> str:
    """The newest FlashAttention package that is installed and supports this device, else torch's own."""
    capability = torch.cuda.get_device_capability(device)
    fits = {4: capability >= (9, 0), 3: capability == (9, 0), 2: capability >= (8, 0)}
    return next((PACKED_FLASH[n] for n in fits if fits[n] and flash.is_installed(n)), PACKED_SDPA)
