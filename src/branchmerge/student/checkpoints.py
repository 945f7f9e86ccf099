"""Checkpoints of a branch in training: each whole or not there, checked before a run goes on from it.

    checkpoints/<domain>-<fingerprint of the work>/step-00000040/
        state/            weights and optimizer, as torch.distributed.checkpoint writes them, shard by shard
        generators.pt     states of the random number generators
        checkpoint.json   step, seconds trained, SHA-256 of every file; written last

The order of rows is the plan's, so the step alone says which rows come next. A branch of other settings or data has
another fingerprint and does not see these.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from branchmerge.study import UNWRITABLE, Manifest, file_sha256, write_json

DONE = "checkpoint.json"
STATE, GENERATORS = "state", "generators.pt"
FULL = 1 << 24
"""A disk with less than so many bytes left was too small for what could not be written."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished one."""

    folder: Path
    step: int
    """Optimizer steps done"""
    seconds: float
    """Of training until then"""


@dataclass(frozen=True)
class _Record:
    step: int
    seconds: float
    sha256: dict[str, str]


class CheckpointFolder:
    """The checkpoints of one branch; the caller holds the lock of its result."""

    def __init__(self, root: Path, planned: Manifest, keep_last: int) -> None:
        work = json.dumps(planned.identity(), sort_keys=True)
        self.folder = root / f"{planned.name}-{hashlib.sha256(work.encode()).hexdigest()[:12]}"
        self.keep_last = keep_last

    def newest(self) -> Checkpoint | None:
        """The last one that is whole; says which are not."""
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                return _read(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"warning: {folder}: not whole ({error}); going on from the one before", flush=True)
        return None

    def write(self, step: int, seconds: float, save: Callable[[Path], None]) -> bool:
        """Have `save` fill a folder, and keep it as the checkpoint of a step; older ones are removed after that.

        Returns:
            Whether it was written; on a full disk the last one stays, and a warning is printed.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".step-{step:08d}.partial"
        try:
            self._remove_left_overs()
            partial.mkdir(parents=True)
            save(partial)
            files = sorted(path for path in partial.rglob("*") if path.is_file())
            digests = {str(path.relative_to(partial)): file_sha256(path) for path in files}
            write_json(partial / DONE, asdict(_Record(step, seconds, digests)))
            _sync([*files, partial / DONE, partial])
            if final.exists():  # one that was not whole
                shutil.rmtree(final)
            partial.rename(final)
        except (OSError, RuntimeError, CheckpointException) as error:
            full = _no_room(self.folder, error)
            shutil.rmtree(partial, ignore_errors=True)
            if not full:
                raise
            why = str(error).strip().splitlines()[-1]
            print(f"warning: {final}: no room for a checkpoint ({why}); training goes on without it", flush=True)
            return False
        for old in sorted(self.folder.glob("step-*"))[: -self.keep_last]:
            shutil.rmtree(old)
        return True

    def remove(self) -> None:
        """When the branch's result is published."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_left_overs(self) -> None:
        for partial in self.folder.glob(".step-*.partial"):
            shutil.rmtree(partial)


def _read(folder: Path) -> Checkpoint:
    """Check a checkpoint byte by byte."""
    record = _Record(**json.loads((folder / DONE).read_text()))
    for name, digest in record.sha256.items():
        if file_sha256(folder / name) != digest:
            raise ValueError(f"{name} has changed")
    return Checkpoint(folder, record.step, record.seconds)


def _no_room(folder: Path, error: BaseException) -> bool:
    """torch's writers tell a full disk in many words, but not in these."""
    if isinstance(error, OSError):
        return error.errno in UNWRITABLE
    return folder.exists() and shutil.disk_usage(folder).free < FULL


def _sync(paths: list[Path]) -> None:
    """To the disk, so that a checkpoint outlives a power failure."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write what training needs to go on exactly."""
    weights, moments = get_state_dict(model, optimizer)
    with _quiet():
        save_shards({"model": weights, "optimizer": moments}, checkpoint_id=folder / STATE)
    torch.save(_generators(), folder / GENERATORS)


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights, moments and generators in place."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    with _quiet():
        load(state, checkpoint_id=folder / STATE)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    generators: dict[str, Any] = torch.load(folder / GENERATORS, weights_only=True)
    torch.set_rng_state(generators["cpu"])
    if generators["cuda"]:
        torch.cuda.set_rng_state_all(generators["cuda"])


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns where only one process trains."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _generators() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
