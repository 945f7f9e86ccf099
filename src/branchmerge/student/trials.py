"""What is tried on a few tokens before training: that documents of a row stay apart, and that attention is told what it
may see; which attention and which way to the loss are right.

There are hundreds of kinds of models. Some mix tokens elsewhere than in attention, some scale, cap or shift their
logits; tried, none of them needs to be known here. All processes of a sharded student do this together, between two
steps (`between_steps.untouched`).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from branchmerge.data.batch import Batch, make_batch
from branchmerge.data.template import Document
from branchmerge.errors import UserError
from branchmerge.student import backbone, flash, liger_loss, ranks
from branchmerge.student.attention import PACKED_FLASH, PACKED_SDPA, PackedRowError, by_formula
from branchmerge.student.loss import Loss, PackedLoss, fused_loss, inputs, summed_loss

TOKENS = 16
"""Of a document"""
LOUD = 100.0
"""A final hidden state so much larger has logits beyond any cap, and far from those that are scaled."""


def check_apart(packed: PackedLoss, device: torch.device, compute: torch.dtype = torch.float32) -> None:
    """Refuse a model in which a document of a packed row depends on the one before it.

    The same document comes after two different ones, and first in a row whose tokens the model numbers itself. Layers
    that mix tokens by a convolution or a state, and know no `cu_seq_lens`, would train without an error, and wrongly;
    so would models that take no `position_ids` (BART), or count them from another number (RoBERTa).

    Args:
        device: that computes; weights may lie elsewhere
        compute: dtype of the matrix products, which says how near the two can be

    Raises:
        UserError: with the relative difference of the hidden states; or its attention is not told of documents
    """
    try:
        rows = [_row(packed, device, first, 3) for first in (1, 2)]
        after = [packed.compute(_second_document, row, whole=False) for row in rows]
        # Rows of one size, so that both are computed alike; whole, so that no device has a part of the first only.
        first = packed.compute(_first_document, _row(packed, device, 3, 1))
        second = packed.compute(_second_document, rows[0])
    except PackedRowError as error:
        raise UserError(
            f"{type(packed.model).__name__}: its layers do not hand on to their attention where documents end, so it"
            " cannot train on packed rows; take another kind of model"
        ) from error
    off = max(ranks.from_all(max(_apart(*after), _apart(second, first))))
    if off > _tolerance(compute):
        raise UserError(
            f"{type(packed.model).__name__}: in a packed row a document sees the one before it (its hidden states"
            f" change by {off:.2g}), as layers without attention do, or is numbered otherwise than alone; take a model"
            " that mixes tokens by attention alone, and takes position_ids that count from 0"
        )


def check_masks(packed: PackedLoss, device: torch.device) -> None:
    """Refuse a model of which only transformers' mask says what a token sees, since a packed row has no mask.

    That is a window that no layer tells its attention (Qwen2-MoE), or tokens that see the ones after them (a Gemma 3
    that was made to embed). Such a model would train without an error, and as another one than it is.
    """
    config = packed.model.config.get_text_config()
    with _what_attention_is_told(config._attn_implementation) as told, torch.compiler.set_stance("force_eager"):
        packed.compute(_hidden, _row(packed, device, 1))
    name = type(packed.model).__name__
    if not all(is_causal for is_causal, _ in told):
        raise UserError(f"{name}: its tokens see the ones after them, which packed rows hide; take a causal model")
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    limited = window is not None and "sliding_attention" in kinds and (longest is None or window < longest)
    if limited and all(window is None for _, window in told):
        raise UserError(
            f"{name}: looks back over a window of {window} tokens that its layers do not tell their attention, so it"
            " would train on packed rows without one; take another kind of model"
        )


def choose_loss(
    packed: PackedLoss, device: torch.device, compute: torch.dtype = torch.float32, fused: bool = False
) -> None:
    """Take the chunked loss where it gives this model's loss, else `summed_loss`, with a warning.

    Args:
        device, compute: as for `check_apart`
        fused: take `fused_loss` where it gives the same as the chunked one, else warn.
    """
    tolerance = _tolerance(compute)
    row = _row(packed, device, 1)
    why = _bias(packed.model) or _difference(packed, packed.chunked, row, tolerance)
    why_not_fused = _why_not_fused(packed, row, device, compute, tolerance) if fused and not why else ""
    packed.loss = summed_loss if why else fused_loss if fused and not why_not_fused else packed.chunked
    if why:
        _warn(
            f"{type(packed.model).__name__}: its output head is not a plain matrix ({why}); the loss takes the logits"
            " of all learned tokens at once, which needs more memory"
        )
    elif why_not_fused:
        _warn(f"backbone.loss=liger: {why_not_fused}; the chunked loss is taken")


def choose_attention(attn: str, shape: dict[str, Any], device: torch.device, compute: torch.dtype) -> str:
    """FlashAttention of a package where its kernels give what the formula gives, else torch's own, with a warning.

    Version 4 has no stable release yet and is made for few sizes of heads; others are compiled by their users.

    Args:
        attn: what `attention.implementation` found
        shape: the model's config.json
    """
    version = next((number for number, name in PACKED_FLASH.items() if name == attn), None)  # not all nodes have it
    why = max(ranks.from_all("" if version is None else _why_not_flash(version, shape, device, compute)))
    if why:
        _warn(f"torch's own attention is taken: {why}")
    return PACKED_SDPA if version and why else attn


def _why_not_flash(version: int, shape: dict[str, Any], device: torch.device, compute: torch.dtype) -> str:
    heads = backbone.head_shape(shape)
    name = f"FlashAttention {version}"
    if heads is None:
        return f"{name} cannot be tried, as the model's config does not tell the number of its heads"
    of_queries, of_keys, size = heads
    lengths = (7, 1, 130, 700)
    draw = torch.Generator(device).manual_seed(0)
    q, k, v, weights = (
        torch.randn(sum(lengths), number, size, generator=draw, device=device).to(compute)
        for number in (of_queries, of_keys, of_keys, of_queries)
    )
    if not flash.takes(version, q, v, None, None):
        return f"{name} is not made for heads of {size}"
    window, softcap = backbone.score_limits(shape)
    # Some layers have them and some not; so small that a trial sees whether they are heeded.
    limits = product({None, window and 50}, {None, softcap and 1.0})
    try:
        tried = (limit for limit in limits if flash.takes(version, q, v, *limit))
        off = float(torch.stack([_off(version, weights, (q, k, v), lengths, *limit) for limit in tried]).max())
    except torch.AcceleratorError as error:  # after which this process can do nothing more there
        raise UserError(
            f"{name} fails on this device for heads of {size} ({error}); run again with backbone.attn=sdpa"
        ) from error
    except Exception as error:  # whatever a kernel, its compiler or another version of the package may raise
        return f"{name}: {type(error).__name__}: {error}".splitlines()[0]
    return "" if off <= _tolerance(compute) else f"{name} is off by {off:.2g} for heads of {size}"


def _off(
    version: int,
    weights: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The largest relative error of FlashAttention's result and gradients, by the formula in float32: a scalar."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=weights.device)

    def by_kernels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.attend(version, q, k, v, bounds, max(lengths), window=window, softcap=softcap)

    def by_documents(*rows: Tensor) -> Tensor:
        parts = zip(*(row.transpose(0, 1)[None].split(lengths, dim=2) for row in rows), strict=True)
        made = [by_formula(q, k, v, window=window, softcap=softcap)[0] for q, k, v in parts]
        return torch.cat(made, dim=1).transpose(0, 1)

    found = _with_gradients(by_kernels, weights, *rows)
    if weights.is_cuda:
        torch.cuda.synchronize(weights.device)  # errors of kernels are told late
    expected = _with_gradients(by_documents, *(tensor.float() for tensor in (weights, *rows)))
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]).max()


def _with_gradients(attend: Callable[..., Tensor], weights: Tensor, *rows: Tensor) -> list[Tensor]:
    rows = tuple(row.detach().requires_grad_() for row in rows)
    out = attend(*rows)
    return [out.detach(), *torch.autograd.grad(out, rows, weights)]


def _warn(text: str) -> None:
    if ranks.is_first():
        warnings.warn(text, stacklevel=3)


def _tolerance(compute: torch.dtype) -> float:
    return 1e-3 if compute == torch.float32 else 2e-2


def _bias(model: PreTrainedModel) -> str:
    """What of the head is more than a matrix though nothing of it shows while it is zero."""
    return "" if getattr(model.get_output_embeddings(), "bias", None) is None else "it has a bias"


def _why_not_fused(packed: PackedLoss, row: Batch, device: torch.device, compute: torch.dtype, tolerance: float) -> str:
    config = packed.model.config.get_text_config()
    why = liger_loss.why_not(config.hidden_size, config.vocab_size, device, compute, tolerance)
    return max(ranks.from_all(why)) or _difference(packed, fused_loss, row, tolerance)


def _difference(packed: PackedLoss, loss: Loss, row: Batch, tolerance: float) -> str:
    """In what a loss differs from `summed_loss` where logits are large, on any device; empty where it does not."""
    why = _difference_here(packed, loss, row, tolerance)
    return max(ranks.from_all(why))


def _difference_here(packed: PackedLoss, loss: Loss, row: Batch, tolerance: float) -> str:
    with _amplified(packed.model):
        expected = packed.compute(summed_loss, row, whole=False)
        try:
            found = packed.compute(loss, row, whole=False)
        except torch.AcceleratorError:  # after which this process can do nothing more on its device
            raise
        except Exception as error:  # a head of another kind, or Triton, whose errors have a base of their own
            return f"{type(error).__name__}: {error}"
    same = torch.isclose(found, expected, rtol=tolerance, equal_nan=True)
    return "" if same else f"{found.item():.6g} for {expected.item():.6g}"


@contextmanager
def _amplified(model: PreTrainedModel) -> Iterator[None]:
    """What goes into the output head, LOUD times as large."""

    def louder(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * LOUD
        return output

    hook = model.base_model.register_forward_hook(louder)
    try:
        yield
    finally:
        hook.remove()


def _apart(found: Tensor, expected: Tensor) -> float:
    """How far hidden states are from others, relative; none, as on devices that have other parts of a row, are not."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean()) if found.numel() else 0.0


@contextmanager
def _what_attention_is_told(implementation: str) -> Iterator[list[tuple[bool, int | None]]]:
    """Inside, of each call of an attention: whether it is causal, and its window."""
    attend = AttentionInterface()[implementation]
    told: list[tuple[bool, int | None]] = []

    def listening(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        told.append((getattr(module, "is_causal", True), kwargs.get("sliding_window")))
        return attend(module, *args, **kwargs)

    AttentionInterface.register(implementation, listening)
    try:
        yield told
    finally:
        AttentionInterface.register(implementation, attend)


def _hidden(model: PreTrainedModel, batch: Batch, **changed: Any) -> Tensor:
    """[T, hidden size]"""
    hidden: Tensor = model.base_model(**{**inputs(batch), **changed}).last_hidden_state[0]
    return hidden


def _first_document(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Its hidden states as transformers gives them to who passes no positions: [TOKENS, hidden size]."""
    return _hidden(model, batch, position_ids=None)[:TOKENS].float()


def _second_document(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states of those of its tokens that are on this device: [up to TOKENS, hidden size]."""
    begin = sum(batch.parts.tokens[: batch.parts.rank]) if batch.parts else 0
    return _hidden(model, batch)[max(0, TOKENS - begin) :].float()


def _row(packed: PackedLoss, device: torch.device, *seeds: int) -> Batch:
    """Documents of TOKENS tokens, one for each seed; none begins with 0, which as padding would have no number."""
    vocabulary = int(packed.model.config.get_text_config().vocab_size)
    documents = [Document("trial", np.arange(1, TOKENS + 1) * 31 * seed % vocabulary, 1) for seed in seeds]
    return make_batch(documents, len(seeds) * (TOKENS - 1)).to(device)
