"""What cannot be merged is refused from configs and headers, with both models and what differs in the message."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from branchmerge.errors import UserError
from branchmerge.merge.checkpoint import Reader
from branchmerge.merge.compatibility import check

Factory = Callable[..., Path]


def check_folders(**folders: Path) -> None:
    with ExitStack() as stack:
        check({name: stack.enter_context(Reader(folder)) for name, folder in folders.items()})


@pytest.fixture
def copied(tiny_student: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_student, tmp_path / "copied")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_tokenizer(folder: Path, edit: Callable[[dict[str, int]], dict[str, int]]) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"] = edit(raw["model"]["vocab"])
    path.write_text(json.dumps(raw))


def test_fine_tunes_of_one_backbone_pass(tiny_student: Path, copied: Path, student_factory: Factory) -> None:
    other = student_factory(copied.parent / "other", seed=1)
    check_folders(math=tiny_student, code=copied, science=other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, "model_type llama and mistral"),
        ({"hidden_size": 64}, "hidden_size 32 and 64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2 and 3"),
        ({"num_attention_heads": 2, "head_dim": 8}, "num_attention_heads 4 and 2"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2 and 4"),
        ({"intermediate_size": 96}, "intermediate_size 64 and 96"),
        ({"vocab_size": 520}, r"the embedding of code has 8 more rows \(512 and 520\)"),
    ],
)
def test_another_architecture_is_refused(
    tiny_student: Path, tmp_path: Path, student_factory: Factory, changes: dict[str, object], said: str
) -> None:
    other = student_factory(tmp_path / "other", **changes)
    with pytest.raises(UserError, match=f"math and code cannot be merged: .*{said}"):
        check_folders(math=tiny_student, code=other)


def test_the_one_that_does_not_fit_is_named_among_many(tiny_student: Path, copied: Path, tmp_path: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.update(extra=torch.ones(1)))
    with pytest.raises(UserError, match="math and science cannot be merged"):
        check_folders(math=tiny_student, code=tiny_student, science=copied)


def test_a_vocabulary_of_the_same_size_with_other_ids_is_refused(tiny_student: Path, copied: Path) -> None:
    def swap(vocabulary: dict[str, int]) -> dict[str, int]:
        first, second = sorted(vocabulary, key=lambda token: vocabulary[token])[300:302]
        return {**vocabulary, first: vocabulary[second], second: vocabulary[first]}

    edit_tokenizer(copied, swap)
    with pytest.raises(UserError, match=r"math and code cannot be merged: .*vocabularies differ \(id 300 is token"):
        check_folders(math=tiny_student, code=copied)


def test_an_added_token_with_another_id_is_refused(tiny_student: Path, copied: Path) -> None:
    path = copied / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["added_tokens"][2]["content"] = "<|end|>"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"math and code cannot be merged: .*vocabularies differ"):
        check_folders(math=tiny_student, code=copied)


def test_the_same_vocabulary_written_otherwise_passes(tiny_student: Path, copied: Path) -> None:
    edit_tokenizer(copied, lambda vocabulary: dict(sorted(vocabulary.items())))
    assert (copied / "tokenizer.json").read_bytes() != (tiny_student / "tokenizer.json").read_bytes()
    check_folders(math=tiny_student, code=copied)


@pytest.mark.parametrize("order", [("math", "code"), ("code", "math")])
def test_a_tensor_that_one_lacks_is_named(tiny_student: Path, copied: Path, order: tuple[str, str]) -> None:
    edit_weights(copied, lambda tensors: tensors.__delitem__("model.norm.weight"))
    folders = {"math": tiny_student, "code": copied}
    with pytest.raises(UserError, match=rf"{order[0]} and {order[1]} .*the tensor model\.norm\.weight is in math only"):
        check_folders(**{name: folders[name] for name in order})


def test_a_tensor_of_another_shape_is_named(tiny_student: Path, copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}))
    with pytest.raises(UserError, match=r"math and code .*model\.norm\.weight has the shapes \[32\] and \[33\]"):
        check_folders(math=tiny_student, code=copied)


def test_another_dtype_passes(tiny_student: Path, copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}))
    check_folders(math=tiny_student, code=copied)


def test_a_config_that_is_not_json_is_named(tiny_student: Path, copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON") as raised:
        check_folders(math=tiny_student, code=copied)
    assert str(copied / "config.json") in str(raised.value)
