"""The run folder contract: where results lie, what their manifest records, and what "finished" means.

A result is a folder that holds a manifest.json. It is built in a hidden folder beside its place, gets its manifest
last and is moved into place by one rename, so a killed process never leaves a folder that looks finished. A lock
per result makes a second process wait for the first and then find the work done.
"""

import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from branchmerge.config import CommonConfig
from branchmerge.errors import UserError
from branchmerge.files import file_sha256, sync, unwritable, whole_or_gone, write_json, writing
from branchmerge.versions import git_commit, package_versions

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Parent:
    """A checkpoint that a result was made from."""

    path: str
    weights_sha256: str


@dataclass
class Manifest:
    """What made a result. A rerun would make the same one if `work` and `parents` are equal."""

    kind: str
    """pretrained, backbone, expert or merged"""
    name: str
    config: dict[str, Any]
    """The whole resolved configuration."""
    work: dict[str, Any]
    """The part of the configuration that decides the result, and the fingerprints of the data."""
    parents: list[Parent] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    weights_sha256: str = ""
    """Fingerprint of the weights in this folder, see `weights_sha256`."""
    packages: dict[str, str] = field(default_factory=dict)
    git_commit: str = ""
    created: str = ""
    """UTC, ISO 8601"""

    def identity(self) -> dict[str, Any]:
        """What must be equal for a rerun to be the same work."""
        # Through JSON, so that what was read from disk equals what was just made (tuples become lists).
        same: dict[str, Any] = json.loads(json.dumps(self.work))
        return {**same, "parents": [parent.weights_sha256 for parent in self.parents]}


class Study:
    """Paths of one study below outputs/."""

    def __init__(self, config: CommonConfig) -> None:
        self.outputs = Path(config.outputs).expanduser()
        self.root = self.outputs / config.study.name
        self.experts = list(config.study.experts)

    @property
    def backbone(self) -> Path:
        """The backbone that the study trained itself."""
        return self.root / "backbone"

    def pretrained(self, name: str) -> Path:
        """A backbone taken out of a package; shared by all studies."""
        return self.outputs / "pretrained" / name

    def expert(self, domain: str) -> Path:
        return self.root / "experts" / domain

    def merged(self, name: str) -> Path:
        return self.root / "merged" / name

    def logs(self, *parts: str) -> Path:
        return self.root.joinpath("logs", *parts)

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of branches in training."""
        return self.root / "checkpoints"

    @property
    def report(self) -> Path:
        return self.root / "report"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished result; None if the folder has none."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        raw["parents"] = [Parent(**parent) for parent in raw["parents"]]
        return Manifest(**raw)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); change its permissions") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a manifest of branchmerge ({error}); move it away or repair it") from error


RECORDED_LATER = ("backbone", "tokenizer", "leaves")
"""Keys of `work` that older results lack, and that are ignored for those."""


def is_done(folder: Path, planned: Manifest, overwrite: bool) -> bool:
    """Whether `folder` already holds the finished result of this work.

    Raises UserError when the folder holds something else and may not be replaced. Only results are ever replaced:
    `overwrite` does not apply to a folder that branchmerge did not make.
    """
    found = read_manifest(folder)
    if found is not None:
        known = {key: value for key, value in planned.work.items() if key in found.work or key not in RECORDED_LATER}
        planned = replace(planned, work=known)
    if found is None:
        check_free(folder)
        return False
    if found.identity() == planned.identity():
        if found.weights_sha256:
            _check_weights(folder)
        return True
    if overwrite:
        return False
    changed = _difference(found.identity(), planned.identity())
    remedy = "give another out=, delete it, or overwrite=true"
    if planned.kind == "backbone":  # made on behalf of a branch, to which out= and overwrite= refer
        remedy = f"backbone.path={folder} takes it as it is; domain=warmup overwrite=true makes it anew; or outputs="
    raise UserError(f"{folder} holds a result made otherwise ({changed}); {remedy}")


def _check_weights(folder: Path) -> None:
    """Refuse a finished result some of whose weight files are missing."""
    from branchmerge.merge.shards import weight_files

    try:
        weight_files(folder)
    except UserError as error:
        raise UserError(f"{folder}: finished once, but {error}; or delete it to have it made again") from error


def check_free(folder: Path) -> None:
    """Refuse a folder with content that branchmerge did not make, or that cannot be replaced by one rename."""
    around = next(filter(_is_result, folder.absolute().parents), None)
    if around is not None:
        raise UserError(f"{folder}: lies inside the result {around}, and would go with it; give another out=")
    if os.path.ismount(folder):
        raise UserError(f"{folder}: is a mount point, which no result can be moved to; give a folder inside it")
    try:
        names = {path.name for path in folder.iterdir()}  # listed once, as another process may be replacing it
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = {folder.name}
    if names and MANIFEST not in names:
        raise UserError(f"{folder} exists and is no result of branchmerge; give another out=, or empty it yourself")


def _is_result(folder: Path) -> bool:
    """Whether branchmerge made the folder; other programs write a manifest.json, too."""
    try:
        return read_manifest(folder) is not None
    except UserError:
        return False


@contextmanager
def publish(folder: Path, planned: Manifest) -> Iterator[Path]:
    """Yield a hidden folder to build a result in. When the block ends, it gets its manifest and becomes `folder`.

    The caller holds `locked(folder)`, so any other hidden folder of that name was left by a killed run.
    """
    remove_left_overs(folder)
    partial = folder.parent / f".{folder.name}.partial"
    with whole_or_gone(partial, folder):
        partial.mkdir(parents=True)
        yield partial
        if not planned.weights_sha256 and any(partial.glob("*.safetensors")):
            planned.weights_sha256 = weights_sha256(partial)
        planned.packages = package_versions()
        planned.git_commit = git_commit()
        planned.created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_json(partial / MANIFEST, asdict(planned))
        _sync(partial)
        retired = folder.parent / f".{folder.name}.partial-retired"
        if replaced := folder.exists():
            folder.rename(retired)
        partial.rename(folder)
        sync(folder.parent)
        if replaced:
            shutil.rmtree(retired)


def remove_left_overs(folder: Path) -> None:
    """Remove hidden folders that killed runs left beside `folder`; the caller holds `locked(folder)`."""
    for stale in folder.parent.glob(f".{glob.escape(folder.name)}.partial*"):
        if stale.is_symlink():
            stale.unlink()
        else:
            shutil.rmtree(stale)


def place(out: str) -> Path:
    """The folder that `out=` names; the target, where it is a symbolic link."""
    folder = Path(out).expanduser()
    with suppress(OSError):  # impossible names, which are refused later
        if folder.is_symlink():
            return folder.resolve()
    return folder


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of `folder`; wait, and say so once, while another process makes it.

    Yields:
        Whether the lock is held; False only with wait=False.
    """
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    with writing(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            Path(lock.lock_file).touch()  # where no file can be, as in /proc, the lock would wait for ever
        except FileNotFoundError as error:
            raise unwritable(folder, error) from error
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if wait:
                with suppress(OSError):  # nobody reads the output any more
                    print(f"waiting for another process that is making {folder}", flush=True)
                lock.acquire()
    if not lock.is_locked:
        yield False
        return
    try:
        remove_left_overs(folder)
        yield True
    finally:
        lock.release()


def weights_sha256(folder: Path) -> str:
    """Fingerprint of a checkpoint's weights: what `sha256sum *.safetensors | sha256sum` prints in its folder."""
    return fingerprint({path.name: file_sha256(path) for path in folder.glob("*.safetensors")})


def fingerprint(files: Mapping[str, str]) -> str:
    """The fingerprint that `weights_sha256` gives, from file names and their SHA-256."""
    lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def parent_of(folder: Path) -> Parent:
    """A checkpoint as a parent; the fingerprint of its weights comes from its manifest where it has one."""
    manifest = read_manifest(folder)
    known = manifest.weights_sha256 if manifest is not None else ""
    return Parent(path=str(folder), weights_sha256=known or weights_sha256(folder))


def _difference(found: Mapping[str, Any], planned: Mapping[str, Any], prefix: str = "") -> str:
    """The first three keys in which two nested dicts differ, with both values."""
    said: list[str] = []
    for key in sorted({*found, *planned}):
        old, new = _by_number(found.get(key)), _by_number(planned.get(key))
        if isinstance(old, dict) and isinstance(new, dict):
            inner = _difference(old, new, f"{prefix}{key}.")
            said += [inner] if inner else []
        elif old != new:
            said.append(f"{prefix}{key}: {_short(old)} there, {_short(new)} now")
    return "; ".join(said[:3])


def _by_number(value: Any) -> Any:
    """A list of dicts as a dict of them."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sync(folder: Path) -> None:
    """Flush every file of a folder to the disk before the rename makes it visible."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(0o644)
        sync(path)
