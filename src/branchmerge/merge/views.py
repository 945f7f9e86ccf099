"""What the merge reads from: a checkpoint's reader, or a view of one with fewer or resized tensors."""

from pathlib import Path
from typing import Protocol

from branchmerge.merge.arrays import Array
from branchmerge.merge.checkpoint import TensorInfo


class Source(Protocol):
    """The interface of `checkpoint.Reader`."""

    folder: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> Array: ...
    def prefetch(self, name: str) -> None: ...
    def release(self, name: str) -> None: ...


class View:
    """Some tensors of a source."""

    def __init__(self, source: Source, tensors: dict[str, TensorInfo]) -> None:
        self.folder = source.folder
        self.source = source
        self.tensors = tensors

    def read(self, name: str) -> Array:
        return self.source.read(name)

    def prefetch(self, name: str) -> None:
        self.source.prefetch(name)

    def release(self, name: str) -> None:
        self.source.release(name)
