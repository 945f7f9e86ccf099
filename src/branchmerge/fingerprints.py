"""SHA-256 of checkpoints' weights, taken by threads while other work goes on.

A process that imports torch or merges needs them at its end only; started early they cost no time of their own.
"""

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from branchmerge.study import Parent, parent_of

_taken: dict[Any, Future[Parent]] = {}


def begin(folder: Path) -> None:
    """Start to take a checkpoint's fingerprint; a folder whose files are as they were is not read again."""
    _future(folder)


def begin_leaves(tree: Any) -> None:
    """The same for all leaves of a merge tree, as it stands in the configuration, that are folders."""
    if isinstance(tree, list):
        for child in tree:
            begin_leaves(child)
    elif isinstance(tree, str) and "/" in tree and Path(tree).expanduser().is_dir():
        begin(Path(tree).expanduser())


def of(folder: Path) -> Parent:
    """The checkpoint as a parent; waits for its fingerprint. Raises UserError where its manifest is none."""
    return _future(folder).result()


def state(folder: Path) -> tuple[Any, ...]:
    """Of a checkpoint's files; another one once they were replaced or written to."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("manifest.json")])
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) for path in files)


def _future(folder: Path) -> Future[Parent]:
    key = (folder, state(folder))
    if key not in _taken:
        _taken[key] = Future()
        # A daemon: a process that ends with an error does not wait for it.
        threading.Thread(target=_take, args=(folder, _taken[key]), daemon=True, name="fingerprint").start()
    return _taken[key]


def _take(folder: Path, future: Future[Parent]) -> None:
    try:
        future.set_result(parent_of(folder))
    except BaseException as error:  # is raised where the result is asked for
        future.set_exception(error)
