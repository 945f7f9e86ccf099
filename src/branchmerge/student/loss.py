"""Next-token cross-entropy over the learned tokens of a packed row.

Shapes: T tokens, N learned tokens among them, H hidden size, V vocabulary, D documents.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from branchmerge.data.batch import Batch
from branchmerge.errors import UserError
from branchmerge.student import liger_loss
from branchmerge.student.attention import refuse_what_is_not_packed
from branchmerge.student.chunked_loss import summed_cross_entropy
from branchmerge.student.context_parallel import ContextGroup

Loss = Callable[[PreTrainedModel, Batch], Tensor]
"""Sum of -log p over the learned tokens of one row, in float32; the caller divides by the learned tokens of the step"""


def packed_logits(model: PreTrainedModel, batch: Batch, positions: Tensor) -> Tensor:
    """Logits at some positions of a packed row; no document attends to another.

    Args:
        positions: int64 [N], indices into the row.

    Returns:
        [N, V]
    """
    logits: Tensor = model(**inputs(batch), logits_to_keep=positions).logits[0]
    return logits


def inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments of the model for a packed row.

    `use_cache=False` and no mask are essential: with a cache or a mask, transformers ignores where documents end.
    """
    bounds, longest = batch.cu_seq_lens, batch.max_length
    return {
        "input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": None, "use_cache": False,
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
        **({"row_parts": batch.parts} if batch.parts else {}),
    }  # fmt: skip


def summed_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The reference loss: by the model's own head, with the logits of all learned tokens in memory at once."""
    logits = packed_logits(model, batch, batch.learned)
    return cross_entropy(logits.float(), batch.targets, reduction="sum")


def chunked_loss(model: PreTrainedModel, batch: Batch, compiled: bool = False) -> Tensor:
    """The same loss with the logits of one chunk of tokens at a time; for heads that only multiply by their weight."""
    return _by_head(partial(summed_cross_entropy, compiled=compiled), model, batch)


def fused_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The same loss as `chunked_loss`, computed by liger-kernel."""
    return _by_head(liger_loss.liger_cross_entropy, model, batch)


def _by_head(cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor], model: PreTrainedModel, batch: Batch) -> Tensor:
    hidden = model.base_model(**inputs(batch)).last_hidden_state[0].index_select(0, batch.learned)
    return cross_entropy(hidden, model.get_output_embeddings().weight, batch.targets)


def check_hidden_states(model: PreTrainedModel) -> None:
    """Refuse a model whose hidden states transformers does not return separately from its logits."""
    if model.base_model is model:
        raise UserError(
            f"model_type={model.config.model_type}: transformers gives no hidden states of {type(model).__name__} apart"
            " from its logits, which the loss is made of; take another kind of model"
        )


class PackedLoss(nn.Module):
    """A causal LM as training calls it: takes a packed row, returns its summed loss. The root of a sharded student.

    The loss is the chunked one unless `trials.choose_loss` sets another.

    If a group of devices shares rows (`context`), each device is given the whole row and returns the loss of its part.
    """

    def __init__(self, model: PreTrainedModel, context: ContextGroup | None = None, compiled: bool = False) -> None:
        """`compiled`: compile the chunked loss with torch.compile."""
        super().__init__()
        check_hidden_states(model)
        model.base_model.register_forward_pre_hook(refuse_what_is_not_packed, with_kwargs=True)
        self.model = model
        self.context = context
        self.chunked: Loss = partial(chunked_loss, compiled=True) if compiled else chunked_loss
        self.loss: Loss = self.chunked

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(self.model, self.context.cut(batch) if self.context else batch)

    def compute(self, function: Loss, batch: Batch, whole: bool = True) -> Tensor:
        """Call `function` in place of the loss, inside this module's forward pass, where a sharded model is gathered.

        Args:
            whole: every device computes the whole row, even if a group shares rows
        """
        loss, context = self.loss, self.context
        self.loss, self.context = function, None if whole else context
        try:
            result: Tensor = self(batch)
        finally:
            self.loss, self.context = loss, context
        return result
