"""What cannot be merged is refused from configs and headers, with both models and what differs in the message."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("null_is_the_default", [True, False])
def test_a_key_that_is_null_is_not_one_that_is_left_out(
    null_is_the_default: bool, student_factory: Factory, tmp_path: Path
) -> None:
    """Where nothing is said, Gemma 2 caps its scores at 50."""
    a = student_factory(tmp_path / "a", model_type="gemma2", head_dim=16)
    b = Path(shutil.copytree(a, tmp_path / "b"))
    key = "pretraining_tp" if null_is_the_default else "attn_logit_softcapping"
    for folder, change in ((a, {}), (b, {key: None})):
        config = json.loads((folder / "config.json").read_text())
        config.pop(key, None)
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    if null_is_the_default:
        return check_folders(a=a, b=b)
    with pytest.raises(UserError, match=r"attn_logit_softcapping 50\.0 and null"):
        check_folders(a=a, b=b)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06 and 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act silu and gelu"),
        ({"attention_bias": True}, "attention_bias false and true"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings true and false"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
         "rope_parameters.rope_theta 10000.0 and 500000.0"),
        ({"rope_parameters": None, "rope_theta": 5e5}, "rope_parameters.rope_theta 10000.0 and 500000.0"),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
         "rope_parameters.factor null and 4.0"),
    ],
)  # fmt: skip
def test_whatever_changes_the_computation_is_refused_with_both_values(
    tiny_student: Path, copied: Path, changes: dict[str, Any], said: str
) -> None:
    edit_config(copied, **changes)
    with pytest.raises(UserError, match="math and code cannot be merged: their architectures differ") as raised:
        check_folders(math=tiny_student, code=copied)
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "/elsewhere", "transformers_version": "4.40.0", "unsloth_version": "2024.9"},
        {"dtype": None, "torch_dtype": "bfloat16", "use_cache": False, "architectures": ["Tuned"]},
        {"eos_token_id": [1, 2], "pad_token_id": None, "bos_token_id": 0},
        {"attention_dropout": 0.1, "initializer_range": 0.1, "id2label": {"0": "x"}},
        {"max_position_embeddings": 4096},
        {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": None},  # as older versions wrote it
        {"attention_bias": None, "mlp_bias": None, "head_dim": None, "pretraining_tp": None, "hidden_act": None},
    ],
)
def test_what_does_not_change_the_computation_may_differ(
    tiny_student: Path, copied: Path, changes: dict[str, Any]
) -> None:
    edit_config(copied, **changes)
    check_folders(math=tiny_student, code=copied)


def test_a_longer_context_matters_where_positions_are_scaled_by_it(tiny_student: Path, copied: Path) -> None:
    scaled = shutil.copytree(tiny_student, copied.parent / "scaled")
    for folder, length in ((copied, 2048), (scaled, 4096)):
        rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
        edit_config(folder, rope_parameters=rope, max_position_embeddings=length)
    with pytest.raises(UserError, match="max_position_embeddings 2048 and 4096"):
        check_folders(math=copied, code=scaled)


def test_windows_that_are_not_used_may_differ(tmp_path: Path, student_factory: Factory) -> None:
    one, other = (student_factory(tmp_path / name, model_type="qwen2") for name in ("one", "other"))
    edit_config(one, use_sliding_window=False, sliding_window=4096, max_window_layers=1)
    edit_config(other, use_sliding_window=False, sliding_window=131072, max_window_layers=28)
    check_folders(one=one, other=other)
    edit_config(other, use_sliding_window=True)
    with pytest.raises(UserError, match="sliding_window"):
        check_folders(one=one, other=other)


def test_a_model_type_that_transformers_does_not_know_is_compared_as_written(tiny_student: Path, copied: Path) -> None:
    other = shutil.copytree(tiny_student, copied.parent / "other")
    for folder in (copied, other):
        edit_config(folder, model_type="own")
    check_folders(math=copied, code=other)
    edit_config(other, experts=4)
    with pytest.raises(UserError, match="experts null and 4"):
        check_folders(math=copied, code=other)


@pytest.mark.parametrize("quantised", [{"quant_method": "gptq", "bits": 4}, {"bits": 4}, "fp8"])
def test_a_quantised_model_is_refused_with_the_remedy(tiny_student: Path, copied: Path, quantised: Any) -> None:
    edit_config(copied, quantization_config=quantised)
    with pytest.raises(UserError, match=r"code .*: is quantised \((gptq|\?|fp8)\).*dequantise it") as raised:
        check_folders(math=tiny_student, code=copied)
    assert str(copied) in str(raised.value)


def test_numbers_and_integers_under_one_name_are_refused(tiny_student: Path, copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight has the dtypes float32 and int8"):
        check_folders(math=tiny_student, code=copied)


def test_several_missing_tensors_are_counted(tiny_student: Path, copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.update(x=torch.ones(1), y=torch.ones(1), z=torch.ones(1)))
    with pytest.raises(UserError, match="the tensor x is in code only, and 2 more are in one of them only"):
        check_folders(math=tiny_student, code=copied)
