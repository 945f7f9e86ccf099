"""Threads for the compiled loops, which release the interpreter's lock, and the memory that they share.

A large tensor is cut into blocks of rows that threads process in parallel. Several smaller tensors are processed in
parallel, each by one thread, so that the Python code between the loops overlaps, too.
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
"""Smallest number of elements that is worth a thread of its own."""
LARGEST = 1 << 30
"""Largest number of elements of a part, unless it is a single row: the loops count in 32 bits."""


class Workers:
    """A pool of threads that lives as long as the process."""

    def __init__(self) -> None:
        self.count = cores()
        self._pool: ThreadPoolExecutor | None = None
        self._inside = threading.local()

    def use(self, count: int) -> None:
        """Use this many threads from now on."""
        if count != self.count and self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self.count = count

    def share(self, work: Callable[[slice], T], rows: int, columns: int) -> list[T]:
        """Cut the rows into one part per thread and call `work` on each; small tensors are one part, huge ones many."""
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
        """Call `work` in a thread of the pool; within it, `share` and `each` use that thread alone."""

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
    """Let the C library reuse freed blocks of up to `limit` bytes.

    By default it returns them to the system and asks for new pages, which costs more than merging them.
    """
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8  # names and numbers of glibc's malloc.h
    try:
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, limit)
        library.mallopt(trim_threshold, 8 * limit)
        library.mallopt(arena_max, 1)  # arenas of threads would return their blocks whatever the limit
    except (OSError, AttributeError):  # another C library: the merge is slower, nothing else
        return
