"""Disks in memory that are soon full, for the tests."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """An empty disk at a place that is made for it; skips where none may be mounted.

    Args:
        size: as mount takes it, such as 9m
    """
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a disk in memory: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
