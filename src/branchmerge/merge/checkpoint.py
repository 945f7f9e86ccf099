"""Safetensors checkpoints, one tensor at a time: a reader over shards, and a writer that never holds the model.

The format: 8 bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape, begin and end of
its bytes), then the bytes of all tensors.
"""

import errno
import json
import math
import mmap
import os
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from branchmerge.errors import UserError
from branchmerge.merge.arrays import CODES, DTYPES, Array
from branchmerge.merge.direct_file import DirectFile
from branchmerge.merge.shards import AGAIN, INDEX, weight_files

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().machine in ("x86_64", "aarch64") else 0)
"""Linux: reserve no memory for private pages that are never written, so a file may be larger than the memory. Python
3.13 has the name."""
LACKING = {
    errno.ENOMEM: "the system has no address space for it: free memory, or allow overcommitting it",
    errno.EMFILE: "raise the limit of open files (ulimit -n), of which each shard is one",
}


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, from a header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """A checkpoint folder, in one file or in shards. Tensors are mapped, not copied: valid until `release`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[mmap.mmap, int]] = {}
        for path, named in weight_files(folder).items():
            try:
                self._add(path, named)
            except OSError as error:
                remedy = LACKING.get(error.errno or 0, AGAIN)
                raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error
            except (SafetensorError, ValueError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error}); {AGAIN}") from error
            except KeyError as error:
                raise UserError(f"{path}: holds a tensor of dtype {error}, which cannot be merged") from error

    def _add(self, path: Path, named: set[str] | None) -> None:
        with safe_open(path, framework="np"):  # the library checks the header against the file's length
            pass
        with path.open("rb") as file:
            # Copy on write: torch requires writable memory, and the file must not change.
            flags, prot = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
        (length,) = struct.unpack("<Q", mapped[:8])
        header = json.loads(mapped[8 : 8 + length])
        header.pop("__metadata__", None)
        if named is not None and named != header.keys():
            name = min(named ^ header.keys())
            what = "lacks {}, which {} places in it" if name in named else "holds {}, which {} does not place in it"
            raise UserError(f"{path}: {what.format(name, INDEX)}; {AGAIN}")
        for name, entry in header.items():
            if name in self.tensors:
                raise ValueError(f"the tensor {name} is in another shard too")
            info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            if math.prod(max(size, 1) for size in info.shape) >= 1 << 62:  # an empty tensor may claim such sizes
                raise ValueError(f"the tensor {name} has the shape {list(info.shape)}")
            self.tensors[name] = info
            self._places[name] = mapped, 8 + length + entry["data_offsets"][0]

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.clear()  # a map closes with the last tensor that uses it

    def read(self, name: str) -> Array:
        """One tensor as it is stored; must not be written to."""
        info = self.tensors[name]
        mapped, start = self._places[name]
        if not info.nbytes:
            return np.empty(info.shape, info.dtype)
        raw = np.frombuffer(mapped, np.uint8, info.nbytes, start)
        if start % info.dtype.itemsize:  # files of old writers may be unaligned
            raw = raw.copy()
        return raw.view(info.dtype).reshape(info.shape)

    def prefetch(self, name: str) -> None:
        """Let the system read a tensor from the disk in the background."""
        self._advise(name, mmap.MADV_WILLNEED)

    def release(self, name: str) -> None:
        """Give a tensor's memory back; its pages stay in the system's cache while there is room."""
        self._advise(name, mmap.MADV_DONTNEED)

    def _advise(self, name: str, advice: int) -> None:
        mapped, start = self._places[name]
        end = start + self.tensors[name].nbytes
        start -= start % mmap.PAGESIZE
        if end > start:
            mapped.madvise(advice, start, end - start)


class Writer:
    """Writes tensors of known dtypes and shapes, in the order announced, into shards of a limited size.

    A thread writes and hashes them while the next tensor is merged; at most two tensors wait.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> None:
        self.folder = folder
        self.shards = _cut(tensors, max_shard_bytes)
        self.tensors = tensors
        self.sha256: dict[str, str] = {}
        """Fingerprint of each finished file."""
        self._names = list(tensors)
        self._next = 0
        self._first = {shard[0]: number for number, shard in enumerate(self.shards) if shard}
        self._file: DirectFile | None = None
        self._thread = ThreadPoolExecutor(1, "write")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait(0)
                if self._next != len(self._names):
                    raise RuntimeError(f"{len(self._names) - self._next} announced tensors were not written")
                if not self.tensors:
                    self._start(0)
                self._finish()
                self._write_index()
        finally:
            self._thread.shutdown(cancel_futures=True)
            if self._file is not None:
                self._file.close()

    def write(self, name: str, tensor: Array) -> None:
        """Append the next tensor, which must not change afterwards.

        Raises:
            UserError: the disk is full; raised by this call or by a later one.
        """
        info = self.tensors[name]
        if name != self._names[self._next] or tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was announced: {info}")
        self._next += 1
        self._waiting.append(self._thread.submit(self._append, name, tensor))
        self._wait(2)

    def _wait(self, left: int) -> None:
        """Wait until at most so many tensors are left to write; raises the errors of the others."""
        while len(self._waiting) > left:
            try:
                self._waiting.popleft().result()
            except OSError as error:
                raise UserError(
                    f"{self.folder.parent}: cannot write the weights ({error.strerror}); make room on that disk"
                ) from error

    def _append(self, name: str, tensor: Array) -> None:
        if name in self._first:
            self._finish()
            self._start(self._first[name])
        assert self._file is not None
        self._file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))

    def _start(self, number: int) -> None:
        """Open a shard, reserve its room on the disk, and write its header."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.shards[number]:
            info = self.tensors[name]
            begin, end = end, end + info.nbytes
            header[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = DirectFile(self.folder / self._file_name(number), 8 + len(text) + end)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _finish(self) -> None:
        if self._file is not None:
            self.sha256[self._file.path.name] = self._file.finish()
            self._file = None

    def _file_name(self, number: int) -> str:
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _write_index(self) -> None:
        """Write the index of tensors and shards, if there are several shards."""
        if len(self.shards) == 1:
            return
        places = {name: self._file_name(number) for number, shard in enumerate(self.shards) for name in shard}
        total = sum(info.nbytes for info in self.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _cut(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> Sequence[Sequence[str]]:
    """Cut the names, in order, into shards; a tensor larger than a shard gets one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards
