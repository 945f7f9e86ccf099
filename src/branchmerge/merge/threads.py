"""Threads for the compiled loops, which release the interpreter's lock: blocks of rows, side by side."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")

BLOCK = 1 << 18
"""Elements of a block of rows: what two tensors of them fit into a second-level cache."""


class Workers:
    """A pool of threads that lives as long as the process."""

    def __init__(self) -> None:
        self.count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._pool: ThreadPoolExecutor | None = None

    def use(self, count: int) -> None:
        """Use so many threads from now on."""
        if count != self.count and self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self.count = count

    def share(self, work: Callable[[slice], T], rows: int, columns: int) -> list[T]:
        """Cut the rows into one part a thread and call `work` on each; small tensors are one part."""
        parts = min(self.count, max(1, rows * columns // BLOCK), max(rows, 1))
        cuts = [rows * i // parts for i in range(parts + 1)]
        slices = [slice(a, b) for a, b in pairwise(cuts)]
        return self.each(work, slices)

    def each(self, work: Callable[[slice], T], slices: Sequence[slice]) -> list[T]:
        """Call `work` on each slice; the results come in their order."""
        if len(slices) <= 1 or self.count == 1:
            return [work(part) for part in slices]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, "merge")
        return list(self._pool.map(work, slices))


workers = Workers()


def blocks_of(part: slice, columns: int) -> list[slice]:
    """Cut a part into blocks of rows that fit into the cache."""
    step = max(1, BLOCK // max(columns, 1))
    return [slice(start, min(start + step, part.stop)) for start in range(part.start, part.stop, step)]
