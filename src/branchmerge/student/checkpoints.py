"""Checkpoints of a branch in training: each whole or not there, checked before a run goes on from it.

    checkpoints/<domain>-<fingerprint of the work>/step-00000040/
        state/            weights and optimizer, as torch.distributed.checkpoint writes them, shard by shard
        generators-0.pt   states of a process's random number generators
        checkpoint.json   step, seconds trained, SHA-256 of every file; written last

The order of rows is the plan's, so the step alone says which rows come next, also where the next run has another number
of processes. A branch of other settings or data has another fingerprint and does not see these. Several processes call
all of this together, and need a folder that all of them see.
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
"""Of a fingerprint in a folder's name"""
FULL = 1 << 24
"""A disk with less than so many bytes left was too small for what could not be written."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a branch is."""

    step: int
    """Optimizer steps done"""
    seconds: float
    """Of training until then"""
    skipped: int = 0
    """Steps among them without a finite loss and gradient"""
    skipped_in_a_row: int = 0
    """Of those the last ones"""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Those that did them, as the manifest will tell"""


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Position):
    """A finished one."""

    folder: Path


@dataclass(frozen=True, kw_only=True)
class _Record(Position):
    sha256: dict[str, str]
    rows: str = ""


@dataclass(frozen=True)
class _Failure:
    """Of a part of the work, the same for all processes."""

    why: str = ""
    """Empty where it did not fail"""
    lacks_room: bool = False


class CheckpointFolder:
    """The checkpoints of one branch; the caller holds the lock of its result."""

    def __init__(self, root: Path, planned: Manifest, keep_last: int) -> None:
        work = json.dumps(planned.identity(), sort_keys=True)
        self.root = root
        self.name = planned.name
        self.folder = root / f"{planned.name}-{hashlib.sha256(work.encode()).hexdigest()[:DIGITS]}"
        self.keep_last = keep_last
        self.rows = ""
        """Fingerprint of the rows that they are made of; none is good for others"""

    def tell_if_small(self, size: float) -> None:
        """Warn where the disk has no room for as many checkpoints of `size` bytes as lie there at once."""
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
        """Say what lies there of branches of this name with other settings or data, which nothing else ever removes."""
        with suppress(OSError):  # as where another run removes them
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
        """The last one that is whole; says which are not."""
        folders = ranks.by_first(lambda: sorted(self.folder.glob("step-*"), reverse=True))
        for folder in folders:
            found, why = _read(folder, self.rows)
            if found is not None:
                return found
            then = "starting anew" if folder == folders[-1] else "going on from the one before"
            ranks.say(f"warning: {folder}: {why}; {then}")
        return None

    def write(self, position: Position, save: Callable[[Path], None]) -> bool:
        """Have `save` fill a folder, and keep it as the checkpoint of that step; older ones are removed after that.

        One of them before that, and `save` is called once more, where the disk has no room for as many.

        Returns:
            Whether it was written; where the disk is full or not ours the last one stays, and a warning is printed.
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
            for folder in [*there[: max(0, last - self.keep_last)], *there[last:]]:  # later ones were passed over
                shutil.rmtree(folder)
        return True

    def _put(
        self, final: Path, position: Position, save: Callable[[Path], None], spare: Path | None = None
    ) -> _Failure:
        """One try; nothing of it is left where it fails. `spare` goes first."""
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
        """What may go to make room: one that is not whole, else the oldest while the newest is another."""
        there = ranks.by_first(lambda: sorted(self.folder.glob("step-*")))
        if there and _read(there[-1], self.rows)[0] is None:  # read again, as it may be all that is left in the end
            return there[-1]
        return there[0] if len(there) > 1 else None

    def _try(self, part: Callable[[], Any]) -> _Failure:
        """Do it in all processes; how it failed where the disk takes it not; raises other errors.

        What a part asks of the other processes it must ask before anything of it can fail.
        """
        why, full, other = "", False, None
        try:
            part()
        except (OSError, RuntimeError, CheckpointException) as error:
            why, full = (str(error).strip() or type(error).__name__).splitlines()[-1], _no_room(self.folder, error)
            if not full and not (isinstance(error, OSError) and error.errno in UNWRITABLE):
                other = error  # no error else is kept: its frames hold the file that torch gave up, and so its room
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
        """Write down what it is, and give it its name."""
        if ranks.is_first():
            write_json(partial / DONE, asdict(record))
            for path in (partial / DONE, *filter(Path.is_dir, partial.rglob("*")), partial):
                sync(path)
            if final.exists():  # one that was not whole
                shutil.rmtree(final)
            partial.rename(final)
            sync(self.folder)  # before older ones go

    def remove(self) -> None:
        """When the branch's result is published."""
        if ranks.is_first():
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # of other branches
                self.root.rmdir()


def _fingerprints(partial: Path) -> dict[str, str]:
    """SHA-256 of what was saved, by name, each process of a part of it; all that is on the disk then."""
    listed = ranks.by_first(
        lambda: sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
    )
    files = _mine(listed)
    for name in files:
        sync(partial / name)
    return {name: file_sha256(partial / name) for name in files}


def _joined(digests: dict[str, str]) -> dict[str, str]:
    """Everyone's."""
    return {name: digest for part in ranks.from_all(digests) for name, digest in part.items()}


def _read(folder: Path, rows: str) -> tuple[Checkpoint | None, str]:
    """Check a checkpoint byte by byte, each process a part of it; the reason where it is not whole."""
    record, why = None, ""
    try:
        record = _Record(**json.loads((folder / DONE).read_text()))
        if folder.name != STEP.format(step=record.step):  # nothing else tells whether these few bytes have changed
            raise ValueError(f"{DONE} tells of step {record.step}")
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
    """This process's part of a list that all have."""
    return names[ranks.rank() :: ranks.world()]


def _no_room(folder: Path, error: BaseException) -> bool:
    """torch's writers tell a full disk in many words, but not in these."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return folder.exists() and shutil.disk_usage(folder).free < FULL


def save_state(folder: Path, model: nn.Module, optimizer: Optimizer, drawn: dict[str, Any]) -> None:
    """Write what training needs to go on exactly.

    Args:
        drawn: `generators` as the next step finds them
    """
    weights, moments = _state(model, optimizer)
    with _quiet():
        save_shards({"model": weights, "optimizer": moments}, checkpoint_id=folder / STATE)
    torch.save(drawn, folder / GENERATORS.format(rank=ranks.rank()))


def load_state(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights, moments and generators in place."""
    weights, moments = _state(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    # Partial: weights that no step reached (a vision tower's) have no moments in the file, and keep those of the start.
    with _quiet():
        load(state, checkpoint_id=folder / STATE, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    mine = folder / GENERATORS.format(rank=ranks.rank())
    if not mine.is_file():  # fewer processes wrote it: these draw other numbers, where they draw any
        return
    drawn: dict[str, Any] = torch.load(mine, weights_only=True)
    torch.set_rng_state(drawn["cpu"])
    if drawn["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(drawn["cuda"])


def _state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of weights and of moments, which may not be there yet: torch makes them by a step, which must not count."""
    if not optimizer.state:
        get_state_dict(model, optimizer)
        for state in optimizer.state.values():
            state["step"].zero_()
    weights, moments = get_state_dict(model, optimizer)
    return weights, moments


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns where only one process trains, and makes an error of its own of Ctrl-C."""
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
    """Their states, on the CPU and on this process's GPU; the next run may see another number of GPUs."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
