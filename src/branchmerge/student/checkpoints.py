"""Checkpoints of a branch in training. Each is complete or absent, and is verified before a run resumes from it.

    checkpoints/<domain>-<fingerprint of the work>/step-00000040/
        state/            weights and optimizer, as torch.distributed.checkpoint writes them, shard by shard
        generators-0.pt   states of the random number generators of rank 0, and so on
        checkpoint.json   step, seconds trained, SHA-256 of every file; written last

The order of rows is fixed before training, so the step alone determines which rows come next, even if the next run has
another number of processes. A branch with other settings or data has another fingerprint, so it never sees these
checkpoints. All processes call these functions together, and need a folder that all of them can see.
"""

import errno
import glob
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer

from branchmerge.files import UNWRITABLE, file_sha256, sync, write_json
from branchmerge.student import ranks
from branchmerge.study import Manifest

DONE = "checkpoint.json"
STEP = "step-{step:08d}"
STATE, GENERATORS = "state", "generators-{rank}.pt"
DIGITS = 12
"""Number of hexadecimal digits of the fingerprint in a folder's name"""
FULL = 1 << 24
"""If a write fails and fewer bytes than this are free, the disk counts as full."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far the training of a branch has got."""

    step: int
    """Optimizer steps done"""
    seconds: float
    """Training time until then, over all runs"""
    skipped: int = 0
    """Steps that were skipped because loss or gradient was not finite"""
    skipped_in_a_row: int = 0
    """How many of the most recent steps were skipped without a good one in between"""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """The runs that did these steps, as the manifest lists them"""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Position):
    """A complete checkpoint on disk."""

    folder: Path


@dataclass(frozen=True, kw_only=True)
class _Record(Position):
    """The contents of checkpoint.json."""

    sha256: dict[str, str]
    """Digest of each file, by its name relative to the checkpoint"""
    rows: str = ""
    """Fingerprint of the rows that were trained on"""


@dataclass(frozen=True)
class _Failure:
    """Outcome of a part of the work, the same on all processes."""

    why: str = ""
    """Empty if it succeeded"""
    lacks_room: bool = False


class CheckpointFolder:
    """The checkpoints of one branch. The caller holds the lock of the branch's result."""

    def __init__(self, root: Path, planned: Manifest, keep_last: int) -> None:
        work = json.dumps(planned.identity(), sort_keys=True)
        self.root = root
        self.name = planned.name
        self.folder = root / f"{planned.name}-{hashlib.sha256(work.encode()).hexdigest()[:DIGITS]}"
        self.keep_last = keep_last
        self.rows = ""
        """Fingerprint of the rows of this run; a checkpoint made with other rows is not used"""

    def tell_if_small(self, size: float) -> None:
        """Warn if the disk has no room for `keep_last + 1` checkpoints of `size` bytes, the most kept at any time."""
        if self.has_some():
            return
        place = next(folder for folder in (self.root.absolute(), *self.root.absolute().parents) if folder.exists())
        needed, free = (self.keep_last + 1) * size, shutil.disk_usage(place).free
        if free < needed:
            ranks.say(
                f"warning: {self.root}: up to {self.keep_last + 1} checkpoints of {size / 1e9:,.3f} GB will lie there,"
                f" the disk has {free / 1e9:,.3f} GB left; what finds no room is not written: give another outputs=, or"
                " trainer.checkpoint.keep_last=1"
            )

    def tell_of_others(self) -> None:
        """Report checkpoints of this branch's name with other settings or data, since nothing else removes them."""
        with suppress(OSError):  # for example because another run removes them at this moment
            for folder in sorted(self.root.glob(f"{glob.escape(self.name)}-{'[0-9a-f]' * DIGITS}")):
                if folder != self.folder and any(folder.glob("step-*")):
                    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    ranks.say(
                        f"{folder}: holds {size / 1e9:,.3f} GB of checkpoints of {self.name} with other settings or"
                        " data; delete it if that training is not to go on"
                    )

    def has_some(self) -> bool:
        return any(self.folder.glob("step-*"))

    def newest(self) -> Checkpoint | None:
        """The most recent complete checkpoint. Warns about each that is not."""
        folders = ranks.by_first(lambda: sorted(self.folder.glob("step-*"), reverse=True))
        for folder in folders:
            found, why = _read(folder, self.rows)
            if found is not None:
                return found
            then = "starting anew" if folder == folders[-1] else "going on from the one before"
            ranks.say(f"warning: {folder}: {why}; {then}")
        return None

    def write(self, position: Position, save: Callable[[Path], None]) -> bool:
        """Publish what `save` writes as the checkpoint of that step, then remove those beyond `keep_last`.

        If the disk is full, one older checkpoint is removed first and `save` is called a second time.

        Returns:
            Whether it was written. If not (disk full, no permission), the last one is kept and a warning printed.
        """
        final = self.folder / STEP.format(step=position.step)
        failed = self._put(final, position, save)
        if failed.lacks_room and (spare := self._spare()) is not None:
            ranks.say(f"warning: {final}: found no room ({failed.why}); {spare.name} is removed for it")
            failed = self._put(final, position, save, spare)
        if failed.why:
            ranks.say(f"warning: {final}: this checkpoint cannot be written ({failed.why}); training goes on")
            return False
        if ranks.is_first():
            there = sorted(self.folder.glob("step-*"))
            last = there.index(final) + 1
            for folder in [*there[: max(0, last - self.keep_last)], *there[last:]]:  # later ones were found broken
                shutil.rmtree(folder)
        return True

    def _put(
        self, final: Path, position: Position, save: Callable[[Path], None], spare: Path | None = None
    ) -> _Failure:
        """Try once, after removing `spare`; a failed try leaves nothing behind."""
        partial = self.folder / f".{final.name}.partial"
        digests: dict[str, str] = {}
        parts: list[Callable[[], Any]] = [
            lambda: self._make(partial, spare),
            lambda: save(partial),
            lambda: digests.update(_fingerprints(partial)),
            lambda: self._finish(partial, final, _Record(**vars(position), sha256=_joined(digests), rows=self.rows)),
        ]
        for part in parts:
            failed = self._try(part)
            if failed.why:
                if ranks.is_first():
                    shutil.rmtree(partial, ignore_errors=True)
                return failed
        return _Failure()

    def _spare(self) -> Path | None:
        """A checkpoint that may be removed to make room: the newest if it is broken, else the oldest of several."""
        there = ranks.by_first(lambda: sorted(self.folder.glob("step-*")))
        if there and _read(there[-1], self.rows)[0] is None:  # verified again, as it may end up the only one
            return there[-1]
        return there[0] if len(there) > 1 else None

    def _try(self, part: Callable[[], Any]) -> _Failure:
        """Run `part` on all processes and return how it failed if the disk is the reason; raises any other error.

        A part may communicate with the other processes only before anything in it can fail, or they would wait for it.
        """
        why, full, other = "", False, None
        try:
            part()
        except (OSError, RuntimeError, CheckpointException) as error:
            why, full = (str(error).strip() or type(error).__name__).splitlines()[-1], _no_room(self.folder, error)
            if not full and not (isinstance(error, OSError) and error.errno in UNWRITABLE):
                other = error  # a full disk's error is not kept: its frames hold torch's open file, and so its space
        told = ranks.from_all((other is None, full, why))
        if other is not None:
            raise other
        if not all(borne for borne, _, _ in told):
            raise RuntimeError("; ".join(why for borne, _, why in told if not borne))
        return _Failure(next((why for *_, why in told if why), ""), any(full for _, full, _ in told))

    def _make(self, partial: Path, spare: Path | None) -> None:
        if not ranks.is_first():
            return
        for left in (*self.folder.glob(".step-*.partial"), *((spare,) if spare else ())):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def _finish(self, partial: Path, final: Path, record: _Record) -> None:
        """Write checkpoint.json, flush everything to disk and rename the folder to its final name."""
        if ranks.is_first():
            write_json(partial / DONE, asdict(record))
            for path in (partial / DONE, *filter(Path.is_dir, partial.rglob("*")), partial):
                sync(path)
            if final.exists():  # a broken one of the same step
                shutil.rmtree(final)
            partial.rename(final)
            sync(self.folder)  # before older checkpoints are removed

    def remove(self) -> None:
        """Remove all of them, once the branch's result is published."""
        if ranks.is_first():
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other branches have checkpoints there
                self.root.rmdir()


def _fingerprints(partial: Path) -> dict[str, str]:
    """Flush this process's share of the saved files to disk and return their SHA-256 by name."""
    listed = ranks.by_first(
        lambda: sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
    )
    files = _mine(listed)
    for name in files:
        sync(partial / name)
    return {name: file_sha256(partial / name) for name in files}


def _joined(digests: dict[str, str]) -> dict[str, str]:
    """The digests of all processes together."""
    return {name: digest for part in ranks.from_all(digests) for name, digest in part.items()}


def _read(folder: Path, rows: str) -> tuple[Checkpoint | None, str]:
    """Verify a checkpoint byte by byte, each process a share of its files; returns the reason if it cannot be used."""
    record, why = None, ""
    try:
        record = _Record(**json.loads((folder / DONE).read_text()))
        if folder.name != STEP.format(step=record.step):  # checkpoint.json has no digest of its own
            raise ValueError(f"{DONE} is of step {record.step}")
        for name in _mine(sorted(record.sha256)):
            if file_sha256(folder / name) != record.sha256[name]:
                raise ValueError(f"{name} has changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"not whole ({error})"
    if record is not None and record.rows not in ("", rows):
        why = "made of other rows than those that were prepared now"
    why = next(filter(None, ranks.from_all(why)), "")
    if why or record is None:
        return None, why
    at = {each.name: getattr(record, each.name) for each in fields(Position)}
    return Checkpoint(folder=folder, **at), ""


def _mine(names: list[str]) -> list[str]:
    """This process's share of a list that all processes have."""
    return names[ranks.rank() :: ranks.world()]


def _no_room(folder: Path, error: BaseException) -> bool:
    """Whether the disk is full; by its free space too, since torch does not always raise an OSError for that."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return folder.exists() and shutil.disk_usage(folder).free < FULL


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer, drawn: dict[str, Any]) -> None:
    """Write everything that an exact resume needs.

    Args:
        drawn: `generators()` as they were before the next step
    """
    weights, moments = _state(model, optimizer)
    with _quiet():
        save_shards({"model": weights, "optimizer": moments}, checkpoint_id=folder / STATE)
    torch.save(drawn, folder / GENERATORS.format(rank=ranks.rank()))


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load a checkpoint's weights, moments and generators."""
    weights, moments = _state(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    # Partial load: weights that got no gradient (a vision tower's) have no moments in the file and keep zeros.
    with _quiet():
        load(state, checkpoint_id=folder / STATE, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    mine = folder / GENERATORS.format(rank=ranks.rank())
    if not mine.is_file():  # written by fewer processes; this one continues with its own random numbers
        return
    drawn: dict[str, Any] = torch.load(mine, weights_only=True)
    torch.set_rng_state(drawn["cpu"])
    if drawn["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(drawn["cuda"])


def _state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of weights and moments. torch creates missing moments by an optimizer step, which must not be counted."""
    if not optimizer.state:
        get_state_dict(model, optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()
    weights, moments = get_state_dict(model, optimizer)
    return weights, moments


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warning about a single process, and unwrap a Ctrl-C from its CheckpointException."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, KeyboardInterrupt):
                raise failure from None
        raise


def generators() -> dict[str, Any]:
    """States of the random number generators of the CPU and of this process's GPU.

    Only that GPU's, since the next run may see another number of GPUs.
    """
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
