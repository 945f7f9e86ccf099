"""A packed row as the model sees it.

Shapes: T tokens of the row, D documents in it.

    documents         a a a a b b b         tokens of a and b, one after the other
    position_ids      0 1 2 3 0 1 2         restart with every document
    cu_seq_lens       0 4 7                 where each begins; attention stays between two of them
    labels            . a a . . b .         the next token, where it is learned; . = IGNORE
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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
    position_ids: Tensor
    """int64 [1, T]"""
    cu_seq_lens: Tensor
    """int32 [D + 1]"""
    max_length: int
    """Tokens of the longest document."""
    supervised_in_step: int
    """Learned tokens of the whole optimizer step that this row is part of: all its micro-batches, all ranks."""
    ids: list[str]
    """The trajectories of the row, to name them when something fails."""
    parts: "RowParts | None" = None
    """How it is cut over several devices; the tokens here, T and all but `cu_seq_lens`, are then one part of it."""

    @property
    def supervised(self) -> int:
        """Learned tokens of this row."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return replace(self, **moved)


TENSORS = ("input_ids", "labels", "position_ids", "cu_seq_lens")


def supervised_tokens(document: Document) -> int:
    """How many tokens of a document are learned."""
    return len(document) - max(document.prompt_len, 1)


def make_batch(documents: Sequence[Document], supervised_in_step: int) -> Batch:
    """Lay documents out as one packed row."""
    tokens = np.concatenate([document.tokens for document in documents], dtype=np.int64)
    labels = np.append(tokens[1:], IGNORE)
    begin = 0
    for document in documents:
        end = begin + len(document)
        labels[begin : begin + max(document.prompt_len, 1) - 1] = IGNORE
        labels[end - 1] = IGNORE
        begin = end
    lengths = torch.tensor([len(document) for document in documents])
    return Batch(
        input_ids=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.cat([torch.arange(len(document)) for document in documents])[None],
        cu_seq_lens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        max_length=int(lengths.max()),
        supervised_in_step=supervised_in_step,
        ids=[document.id for document in documents],
    )


def make_idle_batch(documents: Sequence[Document], supervised_in_step: int) -> Batch:
    """A row that teaches nothing, for a process whose share of a step is smaller than the others'."""
    batch = make_batch(documents[:1], supervised_in_step)
    batch.labels.fill_(IGNORE)
    return batch
