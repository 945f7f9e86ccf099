"""Pack documents of uneven length into rows of at most `capacity` tokens, and rows into optimizer steps.

    documents          rows (capacity 10)              steps (2 rows each)
    aaaa bbbbbb ccc    [dddddddd] [bbbbbbaaaa]    ->   step 0: row 1, row 0
    dddddddd eeeeee    [eeeeeeccc]                     step 1: row 2

Attention never crosses from one document to another (see `Batch`), so packing saves time and changes nothing else.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[int, ...]
"""Indices of its documents"""
Step = tuple[Row, ...]


@dataclass(frozen=True)
class Plan:
    """All optimizer steps of a training, in order."""

    steps: tuple[Step, ...]

    @property
    def rows(self) -> list[Row]:
        return [row for step in self.steps for row in step]


def pack(lengths: Sequence[int], capacity: int, rng: random.Random) -> list[Row]:
    """Pack all documents once, each into the fullest row that still has room for it.

    Documents longer than a third of a row are placed first, by decreasing length, since short ones can fill the room
    that they leave, and not the reverse. Shorter ones are placed in random order: sorted by length, they would share
    rows with documents of the same length, and a step of few rows, all long or all short, teaches length and kind of
    question instead of the domain. With sorting the demo's merged model scored 0.41 instead of 0.70 (docs/log.md,
    2026-11-27).

    Args:
        lengths: tokens of each document, each at most `capacity`.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda document: -lengths[document] if 3 * lengths[document] > capacity else 0)
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in order:
        length = lengths[document]
        if length > capacity:
            raise ValueError(f"document {document} has {length} tokens, a row holds {capacity}")
        place = bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([document])
            insort(free, (capacity - length, len(rows) - 1))
            continue
        left, row = free.pop(place)
        rows[row].append(document)
        insort(free, (left - length, row))
    packed = [tuple(row) for row in rows]
    rng.shuffle(packed)
    return packed


def first_documents(lengths: Sequence[int], capacity: int, rows: int, seed: int) -> list[int]:
    """Indices of the documents in the first `rows` rows of a plan, ascending."""
    return sorted(number for row in pack(lengths, capacity, random.Random(f"{seed}/0"))[:rows] for number in row)


def make_plan(
    lengths: Sequence[int], capacity: int, global_batch: int, epochs: int, max_steps: int | None, seed: int
) -> Plan:
    """Pack each epoch separately, and cut all rows into steps of `global_batch`; only the last step may be smaller."""
    rows: list[Row] = []
    for epoch in range(epochs):
        rows += pack(lengths, capacity, random.Random(f"{seed}/{epoch}"))
        if max_steps is not None and len(rows) >= max_steps * global_batch:
            break
    steps = [tuple(rows[start : start + global_batch]) for start in range(0, len(rows), global_batch)]
    return Plan(tuple(steps[:max_steps]))
