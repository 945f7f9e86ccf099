"""A row on several devices: each holds a part of its tokens, and inside attention some heads of all its tokens.

Every part of a decoder except attention works token by token. Before attention, an all-to-all exchanges tokens for
heads, and another one after it does the reverse (DeepSpeed's Ulysses, arXiv 2309.14509); so attention gets whole
documents, and is computed as on one device.

Shapes: C devices of a group, T tokens of a row, t of them on this device, H heads, G key/value heads, E head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from branchmerge.data.batch import IGNORE, Batch
from branchmerge.student import ranks


@dataclass(frozen=True)
class ContextGroup:
    """The devices that share rows with this one: neighbours by rank, so on one node if the group fits there."""

    group: dist.ProcessGroup
    rank: int
    """Rank of this device in the group"""
    size: int
    """C"""

    @classmethod
    def join(cls, size: int) -> "ContextGroup | None":
        """The group of this process, called by all processes together; None if a row stays on one device."""
        if size == 1:
            return None
        group, _ = dist.new_subgroups(size)
        return cls(group, dist.get_rank(group), size)

    def cut(self, batch: Batch) -> Batch:
        """This device's tokens of a row; the boundaries of documents stay those of the whole row."""
        tokens = batch.input_ids.shape[1]
        bounds = [tokens * i // self.size for i in range(self.size + 1)]
        here = slice(bounds[self.rank], bounds[self.rank + 1])
        labels = batch.labels[:, here]
        return replace(
            batch,
            input_ids=batch.input_ids[:, here],
            labels=labels,
            learned=torch.nonzero(labels[0] != IGNORE)[:, 0],
            position_ids=batch.position_ids[:, here],
            parts=RowParts(self.group, tuple(end - begin for begin, end in pairwise(bounds)), self.rank),
        )


@dataclass(frozen=True)
class RowParts:
    """How the tokens of a row are split over the devices of a group."""

    group: dist.ProcessGroup
    tokens: tuple[int, ...]
    """Number of tokens on each device"""
    rank: int

    def some_heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """[1, H, t, E] and twice [1, G, t, E] -> [1, H/C, T, E] and twice [1, G/C, T, E]."""
        devices = len(self.tokens)
        # [C, t, heads of a device, E]: what is sent to each device
        wanted = [heads[0].unflatten(0, (devices, -1)).transpose(1, 2) for heads in (query, key, value)]
        given = torch.cat(wanted, dim=2)
        here = [self.tokens[self.rank]] * devices
        got = self._exchange(given.flatten(0, 1), here, self.tokens)
        return [heads.transpose(0, 1)[None] for heads in got.split([each.shape[2] for each in wanted], dim=1)]

    def all_heads(self, result: Tensor) -> Tensor:
        """[1, T, H/C, E] -> [1, t, H, E]."""
        here = self.tokens[self.rank]
        got = self._exchange(result[0], self.tokens, [here] * len(self.tokens))
        return got.unflatten(0, (len(self.tokens), here)).transpose(0, 1).flatten(1, 2)[None]

    def _exchange(self, given: Tensor, cut: Sequence[int], got: Sequence[int]) -> Tensor:
        """Send cut[i] tokens to device i and receive got[i] from it: [sum(cut), ...] -> [sum(got), ...]."""
        # torch's public wrapper returns a tensor that waits on its first use: passed to a compiled function, such as
        # FlexAttention, it loses its gradient (torch 2.12 and 2.13).
        exchange, wait = torch.ops._c10d_functional_autograd.all_to_all_single, torch.ops._c10d_functional.wait_tensor
        tensor: Tensor = wait(exchange(given.contiguous(), list(got), list(cut), self.group.group_name))
        return tensor


def rows_of(context: ContextGroup | None) -> tuple[int, int]:
    """Index of the share of a step's rows that this process trains on, and the number of shares."""
    size = context.size if context else 1
    return ranks.rank() // size, ranks.world() // size
