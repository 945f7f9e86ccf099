"""Threads for the compiled loops, which release the interpreter's lock, and the memory that they share.

A large tensor is cut into blocks of rows that are worked on side by side. Of smaller ones several are worked on side by
side, each by one thread, so that what Python does between the loops is done side by side, too.
"""

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

from branchmerge.machine import cores

T = TypeVar("T")

BLOCK = 1 << 18
"""Elements that are worth a thread of their own."""
LARGEST = 1 << 30
"""Elements that a part has at most, but for a row: the loops count them in 32 bits."""


class Workers:
    """A pool of threads that lives as long as the process."""

    def __init__(self) -> None:
        self.count = cores()
        self._pool: ThreadPoolExecutor | None = None
        self._inside = threading.local()

    def use(self, count: int) -> None:
        """Use so many threads from now on."""
        if count != self.count and self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self.count = count

    def share(self, work: Callable[[slice], T], rows: int, columns: int) -> list[T]:
        """Cut the rows into one part a thread and call `work` on each; small tensors are one part, huge ones many."""
        parts = min(self.count, max(1, rows * columns // BLOCK))
        parts = min(max(parts, math.ceil(rows * columns / LARGEST)), max(rows, 1))
        cuts = [rows * i // parts for i in range(parts + 1)]
        slices = [slice(a, b) for a, b in pairwise(cuts)]
        return self.each(work, slices)

    def each(self, work: Callable[[slice], T], slices: Sequence[slice]) -> list[T]:
        """Call `work` on each slice; the results come in their order."""
        if len(slices) <= 1 or self.count == 1 or getattr(self._inside, "yes", False):
            return [work(part) for part in slices]
        return list(self.pool.map(work, slices))

    def begin(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` in a thread of its own; what it shares it does alone."""

        def alone() -> T:
            self._inside.yes = True
            try:
                return work()
            finally:
                self._inside.yes = False

        return self.pool.submit(alone)

    @property
    def pool(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, "merge")
        return self._pool


workers = Workers()


def keep_freed_memory(limit: int = 1 << 25) -> None:
    """Let the C library hand out freed blocks of up to `limit` bytes again.

    It would give them back to the system and ask for new pages, which costs more than a merge of them.
    """
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # names and numbers of glibc's malloc.h
    try:
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, limit)
        library.mallopt(trim_threshold, 8 * limit)
        library.mallopt(arena_max, 1)  # a thread's own blocks would be given back whatever the limit
    except (OSError, AttributeError):  # another C library: slower, nothing else
        return
