"""Files and folders that are written whole or not at all, and what is told where a place cannot be written."""

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from branchmerge.errors import UserError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
              errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EBUSY, errno.EXDEV)  # fmt: skip
"""Errors that the user can mend: the place is full, read-only, not permitted, or no folder; not those of a broken
disk."""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write a JSON list, one entry a line, whole or not at all."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, f"[\n{lines}\n]\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # above all on a full disk, where the partial file takes up room
        partial.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """SHA-256 of a file. In large pieces, since a thread may have to wait for the interpreter lock between two of
    them."""
    digest = hashlib.sha256()
    if not path.stat().st_size:
        return digest.hexdigest()
    piece = 1 << 24
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for start in range(0, len(mapped), piece):
            with memoryview(mapped)[start : start + piece] as view:
                digest.update(view)
            mapped.madvise(mmap.MADV_DONTNEED, start, min(piece, len(mapped) - start))
    return digest.hexdigest()


@contextmanager
def whole_or_gone(partial: Path, folder: Path) -> Iterator[None]:
    """Remove `partial`, which is to become `folder`, if the block fails; raises UserError as `writing` does."""
    try:
        with writing(folder):
            yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of writing `folder` into a UserError where the user can mend it (UNWRITABLE)."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> UserError:
    """What the user is told when a file or folder cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "make room on that disk" if full else "change the permissions or the name"
    return UserError(
        f"{folder.parent}: cannot write {folder.name} there ({error.strerror}); {remedy}, or give another out= or"
        " outputs="
    )


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder if its file system can, to the disk, so that they survive a power
    failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
