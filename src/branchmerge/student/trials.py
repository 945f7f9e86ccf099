"""Trials on a few tokens before training: whether the documents of a row are independent, whether attention gets the
model's masks, and which attention and which loss are correct.

There are hundreds of kinds of models. Some mix tokens outside attention, some scale, cap or shift their logits; with
trials, the code need not know them. All processes of a sharded student run the trials together, inside
`between_steps.untouched`.
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
"""Length of a document of the trials"""
LOUD = 100.0
"""Factor of the final hidden states: so large that any cap or scaling of the logits changes the loss"""


def check_apart(packed: PackedLoss, device: torch.device, compute: torch.dtype = torch.float32) -> None:
    """Refuse a model in which a document of a packed row depends on the one before it.

    Compares the hidden states of one document after two different ones, and as the first of a row for which the model
    makes its own position ids. Without this check, layers that mix tokens by a convolution or a state, and ignore
    `cu_seq_lens`, would train wrongly without an error; so would models that take no `position_ids` (BART), or start
    them at another number (RoBERTa).

    Args:
        device: the device that computes; weights may be elsewhere
        compute: dtype of the matrix products, which decides the tolerance

    Raises:
        UserError: the hidden states differ (with their relative difference), or the layers do not pass the boundaries
            of documents on to their attention
    """
    try:
        rows = [_row(packed, device, first, 3) for first in (1, 2)]
        after = [packed.compute(_second_document, row, whole=False) for row in rows]
        # Rows of equal size, for the same kernels; not split, so that every device has all of the first document.
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
    """Refuse a model that limits or extends attention only by transformers' mask, since a packed row has no mask.

    That is a window that no layer passes to its attention (Qwen2-MoE), or tokens that attend to later ones (a Gemma 3
    for embeddings). Such a model would train without an error, but with another attention than its own.
    """
    config = packed.model.config.get_text_config()
    with _calls_of_attention(config._attn_implementation) as calls, torch.compiler.set_stance("force_eager"):
        packed.compute(_hidden, _row(packed, device, 1))
    name = type(packed.model).__name__
    if not all(is_causal for is_causal, _ in calls):
        raise UserError(f"{name}: its tokens see the ones after them, which packed rows hide; take a causal model")
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    limited = window is not None and "sliding_attention" in kinds and (longest is None or window < longest)
    if limited and all(window is None for _, window in calls):
        raise UserError(
            f"{name}: looks back over a window of {window} tokens that its layers do not tell their attention, so it"
            " would train on packed rows without one; take another kind of model"
        )


def choose_loss(
    packed: PackedLoss, device: torch.device, compute: torch.dtype = torch.float32, fused: bool = False
) -> None:
    """Set the chunked loss if it equals `summed_loss` for this model, else `summed_loss`, with a warning.

    Args:
        device, compute: as for `check_apart`
        fused: set `fused_loss` if it is correct as well, else warn.
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
    """Keep a package's FlashAttention if its kernels agree with the formula, else take torch's own, with a warning.

    Version 4 has no stable release yet and supports few head sizes; users compile the other versions themselves.

    Args:
        attn: the result of `attention.implementation`
        shape: the model's config.json
    """
    version = next((number for number, name in PACKED_FLASH.items() if name == attn), None)  # may differ between nodes
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
    # Layers may have each limit or not; the values are so small that ignoring one fails the trial.
    limits = product({None, window and 50}, {None, softcap and 1.0})
    try:
        tried = (limit for limit in limits if flash.takes(version, q, v, *limit))
        off = float(torch.stack([_off(version, weights, (q, k, v), lengths, *limit) for limit in tried]).max())
    except torch.AcceleratorError as error:  # this process cannot use the device any more
        raise UserError(
            f"{name} fails on this device for heads of {size} ({error}); run again with backbone.attn=sdpa"
        ) from error
    except Exception as error:  # of any kind, from a kernel, its compiler or another version of the package
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
    """The largest relative error of FlashAttention's result and gradients against the formula in float32: a scalar."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=weights.device)

    def by_kernels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash.attend(version, q, k, v, bounds, max(lengths), window=window, softcap=softcap)

    def by_documents(*rows: Tensor) -> Tensor:
        parts = zip(*(row.transpose(0, 1)[None].split(lengths, dim=2) for row in rows), strict=True)
        made = [by_formula(q, k, v, window=window, softcap=softcap)[0] for q, k, v in parts]
        return torch.cat(made, dim=1).transpose(0, 1)

    found = _with_gradients(by_kernels, weights, *rows)
    if weights.is_cuda:
        torch.cuda.synchronize(weights.device)  # kernels report errors asynchronously
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
    """Why the head is more than a matrix where a trial may not show it: a bias, which may still be zero."""
    return "" if getattr(model.get_output_embeddings(), "bias", None) is None else "it has a bias"


def _why_not_fused(packed: PackedLoss, row: Batch, device: torch.device, compute: torch.dtype, tolerance: float) -> str:
    config = packed.model.config.get_text_config()
    why = liger_loss.why_not(config.hidden_size, config.vocab_size, device, compute, tolerance)
    return max(ranks.from_all(why)) or _difference(packed, fused_loss, row, tolerance)


def _difference(packed: PackedLoss, loss: Loss, row: Batch, tolerance: float) -> str:
    """How a loss differs from `summed_loss` for large logits, on any device; empty if it does not."""
    why = _difference_here(packed, loss, row, tolerance)
    return max(ranks.from_all(why))


def _difference_here(packed: PackedLoss, loss: Loss, row: Batch, tolerance: float) -> str:
    with _amplified(packed.model):
        expected = packed.compute(summed_loss, row, whole=False)
        try:
            found = packed.compute(loss, row, whole=False)
        except torch.AcceleratorError:  # this process cannot use its device any more
            raise
        except Exception as error:  # of any kind, from another kind of head or from Triton
            return f"{type(error).__name__}: {error}"
    same = torch.isclose(found, expected, rtol=tolerance, equal_nan=True)
    return "" if same else f"{found.item():.6g} for {expected.item():.6g}"


@contextmanager
def _amplified(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the output head gets hidden states LOUD times as large."""

    def louder(_: nn.Module, __: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * LOUD
        return output

    hook = model.base_model.register_forward_hook(louder)
    try:
        yield
    finally:
        hook.remove()


def _apart(found: Tensor, expected: Tensor) -> float:
    """Mean relative distance of hidden states; 0 without any, as on a device with another part of the row."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean()) if found.numel() else 0.0


@contextmanager
def _calls_of_attention(implementation: str) -> Iterator[list[tuple[bool, int | None]]]:
    """Inside, records each call of an attention: whether it is causal, and its window."""
    attend = AttentionInterface()[implementation]
    calls: list[tuple[bool, int | None]] = []

    def recording(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append((getattr(module, "is_causal", True), kwargs.get("sliding_window")))
        return attend(module, *args, **kwargs)

    AttentionInterface.register(implementation, recording)
    try:
        yield calls
    finally:
        AttentionInterface.register(implementation, attend)


def _hidden(model: PreTrainedModel, batch: Batch, **changed: Any) -> Tensor:
    """[T, hidden size]"""
    hidden: Tensor = model.base_model(**{**inputs(batch), **changed}).last_hidden_state[0]
    return hidden


def _first_document(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states of the first document, with the model's own position ids: [TOKENS, hidden size]."""
    return _hidden(model, batch, position_ids=None)[:TOKENS].float()


def _second_document(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Hidden states of the second document's tokens on this device: [up to TOKENS, hidden size]."""
    begin = sum(batch.parts.tokens[: batch.parts.rank]) if batch.parts else 0
    return _hidden(model, batch)[max(0, TOKENS - begin) :].float()


def _row(packed: PackedLoss, device: torch.device, *seeds: int) -> Batch:
    """A row of documents of TOKENS tokens, one for each seed; none begins with 0, as padding would have no position."""
    vocabulary = int(packed.model.config.get_text_config().vocab_size)
    documents = [Document("trial", np.arange(1, TOKENS + 1) * 31 * seed % vocabulary, 1) for seed in seeds]
    return make_batch(documents, len(seeds) * (TOKENS - 1)).to(device)
