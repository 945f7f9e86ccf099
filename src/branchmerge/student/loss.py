"""Next-token cross-entropy over the learned tokens of a packed row.

Shapes: T tokens, N learned tokens among them, H hidden size, V vocabulary, D documents.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from branchmerge.data.batch import IGNORE, Batch, make_batch
from branchmerge.data.template import Document
from branchmerge.student import liger_loss
from branchmerge.student.chunked_loss import summed_cross_entropy
from branchmerge.student.context_parallel import ContextGroup

Loss = Callable[[PreTrainedModel, Batch], Tensor]
"""Sum of -log p over the learned tokens of one row, in float32; the caller divides by the step's count."""


def packed_logits(model: PreTrainedModel, batch: Batch, positions: Tensor) -> Tensor:
    """Logits at some positions of a packed row; documents do not see each other.

    Args:
        positions: int64 [N], places in the row.

    Returns:
        [N, V]
    """
    logits: Tensor = model(**_inputs(batch), logits_to_keep=positions).logits[0]
    return logits


def _inputs(batch: Batch) -> dict[str, Any]:
    """`use_cache=False` and no mask are essential: with either, transformers ignores where documents end."""
    bounds, longest = batch.cu_seq_lens, batch.max_length
    return {
        "input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": None, "use_cache": False,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
        **({"row_parts": batch.parts} if batch.parts else {}),
    }  # fmt: skip


def _learned(batch: Batch) -> tuple[Tensor, Tensor]:
    """Positions whose next token is learned, and those tokens: int64 [N] each."""
    positions = torch.nonzero(batch.labels[0] != IGNORE)[:, 0]
    return positions, batch.labels[0, positions]


def summed_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The loss by the model's own head, with the logits of all learned tokens at once: the reference."""
    positions, tokens = _learned(batch)
    return cross_entropy(packed_logits(model, batch, positions).float(), tokens, reduction="sum")


def chunked_loss(model: PreTrainedModel, batch: Batch, compiled: bool = False) -> Tensor:
    """The same with the logits of a chunk of tokens at a time; for heads that only multiply by their weight."""
    return _by_head(partial(summed_cross_entropy, compiled=compiled), model, batch)


def fused_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The same as `chunked_loss` by liger-kernel."""
    return _by_head(liger_loss.liger_cross_entropy, model, batch)


def _by_head(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], model: PreTrainedModel, batch: Batch) -> Tensor:
    positions, tokens = _learned(batch)
    hidden = model.base_model(**_inputs(batch)).last_hidden_state[0, positions]
    return cross_entropy(hidden, model.get_output_embeddings().weight, tokens)


class PackedLoss(nn.Module):
    """A causal LM as training calls it: a packed row in, its summed loss out; the root of a sharded student.

    Where a group of devices shares rows (`context`), all of them get the whole row, and each the loss of its tokens.
    """

    def __init__(self, model: PreTrainedModel, context: ContextGroup | None = None, compiled: bool = False) -> None:
        """`compiled`: the chunked loss is, by torch.compile."""
        super().__init__()
        self.model = model
        self.context = context
        self._chunked: Loss = partial(chunked_loss, compiled=True) if compiled else chunked_loss
        self.loss: Loss = self._chunked

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, self.context.cut(batch) if self.context else batch)

    def choose_loss(self, compute: torch.dtype = torch.float32, fused: bool = False) -> None:
        """Take `chunked_loss` where it gives this model's loss, else `summed_loss`, with a warning.

        Some models scale, cap or shift their logits. Tried on a short row, so that none of them needs to be known here.

        Args:
            compute: dtype of the matrix products, which says how near the two can be.
            fused: take `fused_loss` where it gives the same as `chunked_loss`, else warn.
        """
        tolerance = 1e-3 if compute == torch.float32 else 2e-2
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                why = self._difference(self._chunked, tolerance)
                why_not_fused = self._why_not_fused(compute, tolerance) if fused and not why else ""
        finally:
            self.train(training)
        self.loss = summed_loss if why else self._chunked
        if why:
            warnings.warn(
                f"{type(self.model).__name__}: its output head is not a plain matrix ({why}); the loss takes the logits"
                " of all learned tokens at once, which needs more memory",
                stacklevel=2,
            )
        elif why_not_fused:
            warnings.warn(f"backbone.loss=liger: {why_not_fused}; the chunked loss is taken", stacklevel=2)
        elif fused:
            self.loss = fused_loss

    def _why_not_fused(self, compute: torch.dtype, tolerance: float) -> str:
        config = self.model.config.get_text_config()
        device = self.model.device
        why = liger_loss.why_not(config.hidden_size, config.vocab_size, device, compute, tolerance)
        return why or self._difference(fused_loss, tolerance)

    def _difference(self, loss: Loss, tolerance: float) -> str:
        """In what a loss differs from `summed_loss`; empty where it does not."""
        ids = torch.arange(16) * 31 % int(self.model.config.get_text_config().vocab_size)
        row = make_batch([Document("check", tuple(ids.tolist()), 1)], 15).to(self.model.device)
        try:
            self.loss = summed_loss
            expected = self(row)
            self.loss = loss
            found = self(row)
        except (AttributeError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        same = torch.isclose(found, expected, rtol=tolerance, equal_nan=True)
        return "" if same else f"{found.item():.6g} for {expected.item():.6g}"
