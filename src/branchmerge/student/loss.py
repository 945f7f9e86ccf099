"""Next-token cross-entropy over the learned tokens of a packed row.

Shapes: T tokens, N learned tokens among them, V vocabulary, D documents.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from branchmerge.data.batch import IGNORE, Batch


def packed_logits(model: PreTrainedModel, batch: Batch, positions: Tensor) -> Tensor:
    """Logits at some positions of a packed row; documents do not see each other.

    `use_cache=False` and no mask are essential: with either, transformers ignores where documents end.

    Args:
        positions: int64 [N], places in the row.

    Returns:
        [N, V]
    """
    bounds = batch.cu_seq_lens
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
        logits_to_keep=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=batch.max_length,
        max_length_k=batch.max_length,
    )
    logits: Tensor = output.logits[0]
    return logits


def summed_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Sum of -log p over the learned tokens of one row, in float32; the caller divides by the step's count.

    Only learned positions go through the output head, which for a large vocabulary is most of the memory.
    """
    positions = torch.nonzero(batch.labels[0] != IGNORE)[:, 0]
    logits = packed_logits(model, batch, positions)
    return cross_entropy(logits.float(), batch.labels[0, positions], reduction="sum")
