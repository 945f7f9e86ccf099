"""A file that is written once, from start to end, bypassing the system's page cache (O_DIRECT).

A merged model is not read again soon: through the cache it would evict the parents, and allocating its pages cost more
than the merge. The cache is used where the file system cannot bypass it.
"""

import errno
import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 1 << 22
"""Bytes that are collected, hashed and written at a time."""
SECTOR = 4096
"""Addresses and lengths must be multiples of this to bypass the cache."""


class DirectFile:
    """A file of `size` bytes; raises OSError at once if the disk has no room for them."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._digest = hashlib.sha256()
        self._buffer = np.frombuffer(mmap.mmap(-1, PIECE), np.uint8)  # begins at a page
        self._filled = self._written = 0
        self._descriptor = _open(path)
        try:
            _allocate(self._descriptor, size)
        except OSError:
            os.close(self._descriptor)
            raise

    def write(self, raw: Any) -> None:
        """Append bytes."""
        rest = np.frombuffer(raw, np.uint8)
        while rest.size:
            n = min(rest.size, PIECE - self._filled)
            self._buffer[self._filled : self._filled + n] = rest[:n]
            self._filled += n
            rest = rest[n:]
            if self._filled == PIECE:
                self._flush()

    def finish(self) -> str:
        """Write the rest and close; returns the SHA-256."""
        self._flush()
        os.ftruncate(self._descriptor, self.size)  # the last piece was rounded up
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close as it is."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _flush(self) -> None:
        self._digest.update(self._buffer[: self._filled].data)
        rest = self._buffer[: -(-self._filled // SECTOR) * SECTOR]
        while rest.size:  # a nearly full disk takes only a part
            n = os.pwrite(self._descriptor, rest.data, self._written)
            self._written += n
            rest = rest[n:]
        self._filled = 0


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags, 0o644)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve a file's blocks, so that a full disk is found at its start."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # file systems that cannot
            raise
