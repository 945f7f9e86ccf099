"""Broken files: whatever bytes stand in a header or an index, the answer is one clear line or the truth."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from branchmerge.errors import UserError
from branchmerge.merge.arrays import as_array
from branchmerge.merge.checkpoint import Reader
from branchmerge.student.backbone import check_checkpoint, read_config

INDEX = "model.safetensors.index.json"
TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(4).bfloat16(),
    "n": torch.arange(3),
    "z": torch.zeros(0, 2),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path.read_bytes()


def refused_or_true(folder: Path, raw: bytes) -> None:
    """The reader refuses the file by its name, or reads what the safetensors library reads."""
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    try:
        with Reader(folder) as reader:
            found = {name: reader.read(name) for name in reader.tensors}
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    expected = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        read = as_array(tensor)
        assert found[name].dtype == read.dtype and found[name].shape == read.shape
        assert found[name].tobytes() == read.tobytes()


def header_length(raw: bytes) -> int:
    return 8 + int(struct.unpack("<Q", raw[:8])[0])


@given(data=st.data())
@settings(max_examples=400, deadline=2000)
def test_flipped_bits_in_the_header(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, header_length(whole) - 1), min_size=1, max_size=3)):
        raw[place] ^= data.draw(st.integers(1, 255) | st.sampled_from([1 << bit for bit in range(8)]))
    refused_or_true(folder_of(tmp_path_factory), bytes(raw))


@given(data=st.data())
@settings(max_examples=100, deadline=2000)
def test_truncated_anywhere(whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    left = data.draw(st.integers(0, len(whole) - 1))
    folder = folder_of(tmp_path_factory)
    (folder / "model.safetensors").write_bytes(whole[:left])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        Reader(folder)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "", None, 3]),
        "shape": st.lists(st.integers(-1, 3) | st.sampled_from([2**31, 2**63, 2**64 - 1, 2**64, 1.0, None]), max_size=3)
        | st.none(),
        "data_offsets": st.lists(st.integers(-1, 40) | st.sampled_from([2**63, 2**64 - 1]), max_size=3) | st.none(),
        "more": st.none(),
    },
)


@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRY, max_size=3)
    | st.lists(st.integers(), max_size=2)
    | st.none(),
    data=st.binary(max_size=40),
)
@settings(max_examples=300, deadline=2000)
def test_headers_of_any_json(tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    refused_or_true(folder_of(tmp_path_factory), struct.pack("<Q", len(text)) + text + data)


def folder_of(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "corrupted"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize("length", [0, 1, 10**9, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_cannot_be(whole: bytes, tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + whole[8:])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        Reader(tmp_path)


@pytest.mark.parametrize("size", [2**62, 2**63, 2**64 - 1])
def test_an_empty_tensor_that_claims_a_size_without_bounds(tmp_path: Path, size: int) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [0, size], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        Reader(tmp_path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards and their index."""
    save_file({"a": TENSORS["a.weight"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"], "n": TENSORS["n"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "n": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, places: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_are_read_by_their_index_and_other_files_are_not(shards: Path) -> None:
    save_file({"x": torch.ones(1)}, shards / "consolidated.safetensors")
    with Reader(shards) as reader:
        assert reader.tensors.keys() == {"a", "b", "n"}


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors", "n": "two.safetensors", "c": "two.safetensors"},
         f"two.safetensors: lacks c, which {INDEX} places in it"),
        ({"a": "one.safetensors", "b": "two.safetensors"},
         f"two.safetensors: holds n, which {INDEX} does not place in it"),
        ({"a": "../one.safetensors"}, "names '../one.safetensors', which is not a file beside it"),
        ({"a": "/etc/one.safetensors"}, "which is not a file beside it"),
        ({"a": "sub/one.safetensors"}, "which is not a file beside it"),
        ({"a": "..\\one.safetensors"}, "which is not a file beside it"),
        ({"a": ".."}, "which is not a file beside it"),
        ({"a": "one.safetensors", "b": "pytorch_model-00002.bin"}, "names pytorch_model-00002.bin, which is no safe"),
        ({"a": "three.safetensors"}, "three.safetensors: named in"),
        ({"a": 3}, "not an index of shards"),
        ({"a": None}, "not an index of shards"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit(shards: Path, places: dict[str, Any], said: str) -> None:
    write_index(shards, places)
    with pytest.raises(UserError) as raised:
        Reader(shards)
    assert said in str(raised.value) and str(shards) in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": 1}',
        "\x00",
        pytest.param("[" * 9**5, id="deep"),
    ],
)
def test_an_index_that_is_none(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: not an index of shards"):
        Reader(shards)


def test_an_index_that_is_no_text(shards: Path) -> None:
    (shards / INDEX).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not an index of shards"):
        Reader(shards)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"two\.safetensors: .*the tensor a is in another shard too"):
        Reader(tmp_path)


def test_one_file_and_an_index_of_others(shards: Path) -> None:
    save_file({"a": torch.ones(1)}, shards / "model.safetensors")
    with pytest.raises(UserError, match="an index of other files; remove those that are not meant"):
        Reader(shards)


def test_a_shard_lost_where_there_is_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="one of 2 shards, 1 are there"):
        Reader(tmp_path)


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match="can be opened"):
        Reader(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"\xff\xff", b"null"])
def test_a_config_that_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(UserError) as raised:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def pickled_shards(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04N.")


def adapter(folder: Path) -> None:
    no_config(folder)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def adapter_beside_its_base(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_config, "no config.json in it"),
        (no_weights, "no weights at all"),
        (pickled, "only pickled ones (pytorch_model.bin), which can run code; convert them"),
        (pickled_shards, "only pickled ones (pytorch_model-00001-of-00002.bin)"),
        (adapter, "holds an adapter (LoRA), not a whole model; merge it into its base first"),
        (adapter_beside_its_base, "holds an adapter (LoRA)"),
    ],
)
def test_what_is_no_checkpoint(whole: bytes, tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(whole)
    check_checkpoint(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError) as raised:
        check_checkpoint(tmp_path)
    assert said in str(raised.value) and str(tmp_path) in str(raised.value)
