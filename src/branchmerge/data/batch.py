"""A packed row as the model sees it.

Shapes: T tokens of the row, N learned ones among them, D documents in it.

    documents         a a a a b b b         tokens of a and b, one after the other
    position_ids      0 1 2 3 0 1 2         restart with every document
    cu_seq_lens       0 4 7                 boundaries of the documents, which attention does not cross
    labels            . a a . . b .         the next token, where it is learned; . = IGNORE
    learned             1 2     5           the positions of learned tokens in labels

All sizes and counts that training needs of a row are computed here, on the CPU, since reading them from a GPU would
wait for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from branchmerge.data.template import Document

if TYPE_CHECKING:
    from branchmerge.student.context_parallel import RowParts

IGNORE = -100


@dataclass
class Batch:
    """One micro-batch: one packed row."""

    input_ids: Tensor
    """int64 [1, T]"""
    labels: Tensor
    """int64 [1, T]: the token that follows, or IGNORE. Already shifted: position t is scored against labels[t]."""
    learned: Tensor
    """int64 [N]: the positions of `labels` that are not IGNORE"""
    position_ids: Tensor
    """int64 [1, T]"""
    cu_seq_lens: Tensor
    """int32 [D + 1]"""
    lengths: tuple[int, ...]
    """Tokens of each document"""
    supervised_in_step: int
    """Learned tokens of the whole optimizer step that this row is part of: all its micro-batches, all ranks."""
    ids: list[str]
    """Names of the row's trajectories, for messages of errors."""
    parts: "RowParts | None" = None
    """How the row is split over several devices; T and all tensors but `cu_seq_lens` are then those of one part."""

    @property
    def targets(self) -> Tensor:
        """int64 [N]: the tokens that are learned."""
        return self.labels[0].index_select(0, self.learned)

    @property
    def supervised(self) -> int:
        """Learned tokens of this row."""
        return len(self.learned)

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; copied to a GPU asynchronously if its memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory; called by torch's DataLoader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, **changed)


TENSORS = ("input_ids", "labels", "learned", "position_ids", "cu_seq_lens")


def supervised_tokens(document: Document) -> int:
    """Number of learned tokens of a document."""
    return len(document) - max(document.prompt_len, 1)


def make_batch(documents: Sequence[Document], supervised_in_step: int) -> Batch:
    """Concatenate documents to one packed row."""
    tokens = np.concatenate([document.tokens for document in documents], dtype=np.int64)
    labels = np.append(tokens[1:], IGNORE)
    begin = 0
    for document in documents:
        end = begin + len(document)
        labels[begin : begin + max(document.prompt_len, 1) - 1] = IGNORE
        labels[end - 1] = IGNORE
        begin = end
    lengths = tuple(len(document) for document in documents)
    return Batch(
        input_ids=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        learned=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        lengths=lengths,
        supervised_in_step=supervised_in_step,
        ids=[document.id for document in documents],
    )


def make_idle_batch(documents: Sequence[Document], supervised_in_step: int) -> Batch:
    """A row without learned tokens, for a process that has fewer rows of a step than the others."""
    batch = make_batch(documents[:1], supervised_in_step)
    return replace(batch, labels=batch.labels.fill_(IGNORE), learned=batch.learned[:0])
