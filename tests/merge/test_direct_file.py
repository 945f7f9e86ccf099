"""Files written past the system's cache hold what was written, whatever their size and the file system."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from branchmerge.merge.direct_file import PIECE, SECTOR, DirectFile


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk, and one on a file system that lives in memory."""
    if request.param == "disk":
        yield tmp_path
        return
    shared = Path("/dev/shm")
    if not (shared.is_dir() and os.access(shared, os.W_OK)):
        pytest.skip("no /dev/shm to write to")
    with tempfile.TemporaryDirectory(dir=shared) as name:
        yield Path(name)


@pytest.mark.parametrize("size", [0, 1, SECTOR - 1, SECTOR, SECTOR + 1, PIECE - 8, PIECE, PIECE + 1, 2 * PIECE + 5000])
def test_the_bytes_and_their_fingerprint(folder: Path, size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()
    file = DirectFile(folder / "weights", size)
    for start in range(0, size, 1_234_567):
        file.write(content[start : start + 1_234_567])
    fingerprint = file.finish()
    assert (folder / "weights").read_bytes() == content
    assert fingerprint == hashlib.sha256(content).hexdigest()


def test_it_can_be_left_as_it_is(folder: Path) -> None:
    file = DirectFile(folder / "weights", 3 * PIECE)
    file.write(b"x" * (PIECE + 5))
    file.close()
    file.close()
    assert (folder / "weights").read_bytes()[:PIECE] == b"x" * PIECE


def test_a_disk_without_room_is_found_at_once(folder: Path) -> None:
    with pytest.raises(OSError, match=r"No space left|File too large"):
        DirectFile(folder / "weights", 1 << 60)
