"""Attention over a packed row that never crosses from one document to the next.

The model gets `cu_seq_lens` and no mask. `packed_sdpa` below serves every device without a T x T mask and without work
between documents: on CUDA in half precision one call of FlashAttention for the whole row, elsewhere one causal SDPA
call a document. Torch's own FlashAttention caps no scores, and SDPA knows no window either: there FlexAttention does it
on CUDA, the formula document by document on a CPU. `PACKED_FLASH` are the same with FlashAttention 2, 3 or 4 of their
packages in place of torch's, where those take the heads, the window and the cap.

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
"""By version; transformers gives what has sdpa in its name to models that can take SDPA."""
SHORT = 512
"""Tokens of a document up to which a CPU's attention is faster in float32 than in bfloat16: by a tenth, and for very
short ones three times (docs/log.md, 2026-11-27)."""


BLOCK = 128
"""Tokens of FlexAttention's blocks of queries and of keys"""


class PackedRowError(ValueError):
    """What the attention was given is no packed row."""

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
    """Causal attention inside each document, in the form transformers calls.

    Args:
        query: [1, H, T, E]; key and value: [1, G, T, E].
        cu_seq_lens_q: int32 [D + 1], where the documents begin and end.
        row_parts: where the row is cut over several devices; T are then the tokens here.
        version: of FlashAttention in place of torch's own.

    Returns:
        [1, T, H, E]

    Raises:
        PackedRowError: on what is no packed row: no cu_seq_lens, a mask, several rows, keys of a cache.
        UserError: on attention sinks (`s_aux`).
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
    """By what serves this device; [1, H, T, E] and [1, G, T, E] -> [1, T, H, E]."""
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
    """Attention of one document, in the dtype of products; float32 in between where that is faster."""
    compute = compute_dtype(query)
    if query.device.type != "cpu" or query.shape[2] > SHORT or compute == torch.float32:
        return attend(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return attend(query.float(), key.float(), value.float()).to(compute)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float = 0.0) -> Tensor:
    """torch's attention over one document."""
    if query.is_cuda:  # where its FlashAttention does not fit, what takes fewer keys than queries would hold all scores
        key, value = _for_each_query(query, key, value)
    grouped = key.shape[1] != query.shape[1]
    return scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
    )


def _for_each_query(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each of the queries' heads: twice [1, G, T, E] -> twice [1, H, T, E]."""
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def _has_flash_attention(query: Tensor) -> bool:
    """Whether this device has any, of torch or of a package, in this precision."""
    half = compute_dtype(query) in (torch.bfloat16, torch.float16)
    return half and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether torch's own takes rows of several documents, and such heads."""
    return flash4.fits(query, value, flash.WIDEST) and {"scale", "window_size"} <= _varlen_parameters()


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
    window: int | None,
) -> Tensor:
    """By torch's own FlashAttention; [1, H, T, E] and [1, G, T, E] -> [1, T, H, E]."""
    span = (-1 if window is None else window - 1, 0)  # so many tokens back, none ahead
    q, k, v = _tokens_first(query, key, value)
    grouped: dict[str, Any] = {"enable_gqa": k.shape[1] != q.shape[1]} if "enable_gqa" in _varlen_parameters() else {}
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=span, **grouped)
    assert isinstance(out, Tensor)
    return out[None]


def _tokens_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[1, H, T, E] and [1, G, T, E] -> [T, H, E] and [T, G, E], in the dtype of products."""
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
    """softmax(cap(Q K^T scale)) V of one document, each token seeing itself and up to window - 1 before it.

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
    """[1, H, T, E] and [1, G, T, E] -> [1, T, H, E]."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    q, k, v = (heads.to(compute_dtype(query)) for heads in (query, key, value))
    grouped = k.shape[1] != q.shape[1]
    blocks = _blocks(bounds, query.shape[2], window)
    out = _compiled_flex(query.is_cuda)(q, k, v, capped, blocks, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@lru_cache(maxsize=4)
def _blocks(bounds: Tensor, tokens: int, window: int | None) -> BlockMask:
    """Of which blocks of scores all are wanted, or some; the layers of a step ask with the same `bounds` (their hash).

    From the blocks' first and last tokens: `create_block_mask` would look at all T x T.
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
    """bool [rows, columns] -> int32 [1, 1, rows] and [1, 1, rows, columns]: how many of a row, and which come first."""
    places = wanted.int().argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(dim=-1, dtype=torch.int32)[None, None], places.int()[None, None]


@cache
def _compiled_flex(compiled: bool) -> Any:
    """Uncompiled it holds all scores, so only a CPU, where it serves as a check, gets it so."""
    allow_many_compilations()
    return torch.compile(flex_attention) if compiled else flex_attention


def refuse_what_is_not_packed(model: nn.Module, _: Any, given: dict[str, Any]) -> None:
    """A forward pre-hook: raise on a mask, which transformers would drop, on a cache, before which nothing ends, and
    without the documents' bounds, as transformers' own attention would take the row as one document."""
    if given.get("attention_mask") is not None or given.get("cu_seq_lens_q") is None:
        raise PackedRowError
    cache = given.get("use_cache")
    config: Any = model.config
    if getattr(config, "use_cache", False) if cache is None else cache:
        raise PackedRowError("packed rows take no cache: call the model with use_cache=False")


# Without an entry in AttentionMaskInterface: there transformers would ask the device, row by row, whether it is packed.
AttentionInterface.register(PACKED_SDPA, packed_sdpa)
for version, name in PACKED_FLASH.items():
    AttentionInterface.register(name, partial(packed_sdpa, version=version))


def implementation(attn: str, device: torch.device, compute: torch.dtype, shared: bool = False) -> str:
    """The attention that transformers shall use for `backbone.attn` on a device.

    Args:
        compute: dtype of the matrix products
        shared: rows are on several devices
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
    """flash-attn as far as it is installed and made for this device, else torch's own."""
    capability = torch.cuda.get_device_capability(device)
    fits = {4: capability >= (9, 0), 3: capability == (9, 0), 2: capability >= (8, 0)}
    return next((PACKED_FLASH[n] for n in fits if fits[n] and flash.is_installed(n)), PACKED_SDPA)
