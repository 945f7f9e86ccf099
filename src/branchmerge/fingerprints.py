"""SHA-256 of checkpoints' weights, computed by background threads.

They are needed only at the end of a merge; started early, while torch is imported and tensors are merged, they cost no
time of their own.
"""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from branchmerge.study import Parent, parent_of

_taken: dict[Any, Future[Parent]] = {}


def begin(folder: Path) -> None:
    """Start to compute a checkpoint's fingerprint, unless it is known and the files have not changed since."""
    _future(folder)


def begin_leaves(tree: Any) -> None:
    """`begin` for all leaves of a merge tree, in the form of the configuration, that are folders."""
    if isinstance(tree, list):
        for child in tree:
            begin_leaves(child)
    elif isinstance(tree, str) and "/" in tree and Path(tree).expanduser().is_dir():
        begin(Path(tree).expanduser())


def of(folder: Path) -> Parent:
    """The checkpoint as a parent; waits for its fingerprint. Raises UserError if its manifest is not valid."""
    return _future(folder).result()


def state(folder: Path) -> tuple[Any, ...]:
    """Sizes, times and inodes of a checkpoint's files, which differ once any is replaced or written to."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("manifest.json")])
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) for path in files)


def _future(folder: Path) -> Future[Parent]:
    key = (folder, state(folder))
    if key not in _taken:
        _taken[key] = Future()
        # A daemon thread, so that a process that ends with an error does not wait for it.
        threading.Thread(target=_take, args=(folder, _taken[key]), daemon=True, name="fingerprint").start()
    return _taken[key]


def _take(folder: Path, future: Future[Parent]) -> None:
    try:
        future.set_result(parent_of(folder))
    except BaseException as error:  # raised again by `of`
        future.set_exception(error)
