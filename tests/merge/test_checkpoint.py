"""The safetensors writer and reader against the safetensors library itself."""

import json
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from branchmerge.errors import UserError
from branchmerge.merge.arrays import DTYPES, as_array, as_tensor
from branchmerge.merge.checkpoint import Reader, TensorInfo, Writer

INDEX = "model.safetensors.index.json"


def info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(as_array(tensor).dtype, tuple(tensor.shape))


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 1 << 30) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, {name: info(tensor) for name, tensor in tensors.items()}, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, as_array(tensor))


def read(folder: Path) -> dict[str, Tensor]:
    with Reader(folder) as reader:
        return {name: as_tensor(reader.read(name)) for name in reader.tensors}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits; NaN is compared as its bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert info(found[name]) == info(tensor), name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights(dtype: torch.dtype, *shape: int) -> Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(5))).to(dtype)


FIVE = {f"layer.{number}": weights(torch.float32, 10, 10) for number in range(5)}  # 400 bytes each


@pytest.mark.parametrize(
    "tensor",
    [
        weights(torch.float32, 3, 5),
        weights(torch.bfloat16, 7, 3),
        weights(torch.float16, 9),
        weights(torch.float64, 2, 2, 2),
        weights(torch.int64, 4, 4),
        weights(torch.int32, 4, 4) > 0,
        torch.empty(0, 5),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.arange(12.0).reshape(3, 4).T,
    ],
    ids=["float32", "bfloat16", "float16", "float64", "int64", "bool", "empty", "special", "transposed"],
)
def test_what_is_written_is_what_safetensors_loads(tmp_path: Path, tensor: Tensor) -> None:
    tensors = {"before": weights(torch.float32, 3), "x": tensor, "after": weights(torch.bfloat16, 2)}
    write(tmp_path, tensors)
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)


def test_a_scalar_is_written(tmp_path: Path) -> None:
    write(tmp_path, {"scale": torch.tensor(2.5)})
    assert_same(load_file(tmp_path / "model.safetensors"), {"scale": torch.tensor(2.5)})


def test_the_file_says_that_it_is_torchs_and_starts_its_data_on_eight_bytes(tmp_path: Path) -> None:
    write(tmp_path, FIVE)
    raw = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write(tmp_path, FIVE)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_stay_within_their_size_and_the_index_says_where_what_is(tmp_path: Path) -> None:
    write(tmp_path, FIVE, max_shard_bytes=1000)
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, INDEX]
    places = {name: shards[number // 2] for number, name in enumerate(FIVE)}
    assert json.loads((tmp_path / INDEX).read_text()) == {"metadata": {"total_size": 2000}, "weight_map": places}
    for shard in shards:
        assert_same(load_file(tmp_path / shard), {name: FIVE[name] for name in FIVE if places[name] == shard})


def test_a_shard_may_be_as_large_as_it_is_allowed(tmp_path: Path) -> None:
    write(tmp_path, FIVE, max_shard_bytes=800)
    assert [len(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [2, 2, 1]


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": weights(torch.float32, 5), "large": weights(torch.float32, 99), "b": weights(torch.float32, 5)}
    write(tmp_path, tensors, max_shard_bytes=100)
    assert [len(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))] == [1, 1, 1]
    assert_same(read(tmp_path), tensors)


@pytest.mark.parametrize("max_shard_bytes", [1, 60_000, 1 << 30])
def test_transformers_loads_what_is_written(tiny_student: Path, tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = load_file(tiny_student / "model.safetensors")
    write(tmp_path, tensors, max_shard_bytes)
    (tmp_path / "config.json").write_bytes((tiny_student / "config.json").read_bytes())
    assert (tmp_path / INDEX).is_file() == (max_shard_bytes < 1 << 30)
    found, expected = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path, tiny_student))
    assert_same(found, expected)


def test_reading_shards_equals_reading_one_file(tiny_student: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_student).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(read(tmp_path), read(tiny_student))


def test_the_reader_knows_dtypes_and_shapes(tmp_path: Path) -> None:
    save_file({"a": weights(torch.bfloat16, 2, 3), "b": torch.tensor(1)}, tmp_path / "model.safetensors")
    with Reader(tmp_path) as reader:
        assert reader.tensors == {"a": TensorInfo(DTYPES["BF16"], (2, 3)), "b": TensorInfo(DTYPES["I64"], ())}
        assert reader.tensors["a"].nbytes == 12 and reader.tensors["b"].nbytes == 8


def test_announced_tensors_must_all_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="4 announced tensors were not written"),
        Writer(tmp_path, {name: info(tensor) for name, tensor in FIVE.items()}, 1000) as writer,
    ):
        writer.write("layer.0", as_array(FIVE["layer.0"]))
    assert not (tmp_path / INDEX).exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layer.1", FIVE["layer.1"]),
        ("layer.0", FIVE["layer.0"].half()),
        ("layer.0", FIVE["layer.0"][:5]),
        ("layer.0", FIVE["layer.0"].flatten()),
    ],
    ids=["order", "dtype", "size", "shape"],
)
def test_what_was_not_announced_is_refused(tmp_path: Path, name: str, tensor: Tensor) -> None:
    with (
        pytest.raises(ValueError, match=f"{name}: .* is not what was announced"),
        Writer(tmp_path, {name: info(tensor) for name, tensor in FIVE.items()}, 1 << 30) as writer,
    ):
        writer.write(name, as_array(tensor))


def test_an_error_inside_the_block_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Writer(tmp_path, {"a": info(torch.ones(1))}, 1 << 30):
        _ = 1 / 0


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[list[Path]]:
    write(tmp_path, FIVE, max_shard_bytes=1000)
    yield sorted(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_named(shards: list[Path], left: int) -> None:
    shards[1].write_bytes(shards[1].read_bytes()[:left])
    with pytest.raises(UserError, match=f"{shards[1].name}: not a readable safetensors file") as raised:
        Reader(shards[1].parent)
    assert str(shards[1]) in str(raised.value)


@pytest.mark.parametrize("place", [0, 7, 8, 9, 40])
def test_a_flipped_byte_in_the_header_is_named(shards: list[Path], place: int) -> None:
    raw = bytearray(shards[2].read_bytes())
    raw[place] ^= 0xFF
    shards[2].write_bytes(raw)
    with pytest.raises(UserError, match="not a readable safetensors file") as raised:
        Reader(shards[2].parent)
    assert str(shards[2]) in str(raised.value)


@pytest.mark.parametrize("spaces", range(4))
def test_tensors_anywhere_in_a_file_are_aligned_in_memory(tmp_path: Path, spaces: int) -> None:
    """Writers of old filled no header up to eight bytes; compiled loops may ask for aligned numbers."""
    values = weights(torch.float32, 5)
    entries = {"one": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
               "w": {"dtype": "F32", "shape": [5], "data_offsets": [1, 21]}}  # fmt: skip
    header = json.dumps(entries).encode() + b" " * spaces
    raw = struct.pack("<Q", len(header)) + header + b"\x07" + as_array(values).tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    with Reader(tmp_path) as reader:
        found = reader.read("w")
        assert found.flags.aligned and torch.equal(as_tensor(found), values)
        assert reader.read("one").tolist() == [7]


def test_a_file_larger_than_the_memory_is_opened(tmp_path: Path) -> None:
    """Its data are a hole, as only what is read takes memory."""
    size = 4 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with Reader(tmp_path) as reader:
        assert reader.read("w")[-3:].tolist() == [0, 0, 0]


def test_too_many_open_files_are_told_as_such(tmp_path: Path) -> None:
    write(tmp_path, {f"w{i}": torch.ones(4) for i in range(40)}, max_shard_bytes=16)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, limit[1]))  # noqa: PTH208
    try:
        with pytest.raises(UserError, match=r"cannot be read .*; raise the limit of open files"):
            Reader(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_dtype_that_cannot_be_merged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match="dtype 'F8_E4M3', which cannot be merged") as raised:
        Reader(tmp_path)
    assert str(path) in str(raised.value)
