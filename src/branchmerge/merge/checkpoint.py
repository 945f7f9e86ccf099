"""Safetensors checkpoints, one tensor at a time: a reader over shards, and a writer that never holds the model.

The format: 8 bytes with the header's length (little-endian), the header (JSON: name -> dtype, shape, begin and end of
its bytes), then the bytes of all tensors.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from branchmerge.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, by its index where it has one; raises UserError if one is lost."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
        lost = [path for path in paths if not path.is_file()]
        if lost:
            raise UserError(f"{lost[0]}: named in {index.name} but not there; copy or download it again")
        return paths
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


class Reader:
    """A checkpoint folder, in one file or in shards; maps the files and copies a tensor when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for path in weight_files(folder):
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 - no mapping
                    info = file.get_slice(name)
                    self.tensors[name] = TensorInfo(DTYPES[info.get_dtype()], tuple(info.get_shape()))
                    self._files[name] = file
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: not a readable safetensors file ({error}); copy or download it again"
                ) from error
            except KeyError as error:
                raise UserError(f"{path}: holds a tensor of dtype {error}, which cannot be merged") from error

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


class Writer:
    """Writes tensors of known dtypes and shapes, in the order announced, into shards of a limited size."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> None:
        self.folder = folder
        self.shards = _cut(tensors, max_shard_bytes)
        self.tensors = tensors
        self._names = list(tensors)
        self._next = 0
        self._file: Any = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            if self._next != len(self._names):
                raise RuntimeError(f"{len(self._names) - self._next} announced tensors were not written")
            self._write_index()

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        info = self.tensors[name]
        if name != self._names[self._next] or tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was announced: {info}")
        for number, shard in enumerate(self.shards):
            if name == shard[0]:
                self._start(number)
        self._file.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        self._next += 1

    def _start(self, number: int) -> None:
        """Open a shard and write its header."""
        if self._file is not None:
            self._file.close()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in self.shards[number]:
            info = self.tensors[name]
            begin, end = end, end + info.nbytes
            header[name] = {"dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / self._file_name(number)).open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _file_name(self, number: int) -> str:
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def _write_index(self) -> None:
        """Say which shard holds which tensor, where there is more than one."""
        if len(self.shards) == 1:
            return
        places = {name: self._file_name(number) for number, shard in enumerate(self.shards) for name in shard}
        total = sum(info.nbytes for info in self.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
