"""What a trained student becomes on disk."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_student
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from branchmerge.student.backbone import load_model
from branchmerge.student.export import export
from branchmerge.student.stored import empty_model


@pytest.mark.parametrize("tied", [True, False])
def test_an_expert_is_what_was_trained_rounded_to_bfloat16_in_shards(tied: bool, tmp_path: Path) -> None:
    backbone = make_student(tmp_path / "backbone", model_type="qwen2", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    out = tmp_path / "out"
    out.mkdir()
    export(model, backbone, out, torch.bfloat16, max_shard_bytes=30_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 1
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["Qwen2ForCausalLM"]
    as_before = json.loads((backbone / "config.json").read_text())
    assert config == as_before | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}  # under names other versions know
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    expected = dict(model.named_parameters())
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in loaded.named_parameters())
    AutoTokenizer.from_pretrained(out)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (backbone / name).read_bytes()


@pytest.mark.parametrize(("model_type", "experts"), [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts")])
def test_experts_of_a_layer_have_the_names_that_they_had(model_type: str, experts: str, tmp_path: Path) -> None:
    """transformers joins them in memory; a merge needs all its checkpoints to have the same names."""
    backbone = make_student(tmp_path / "backbone", model_type=model_type, **{experts: 4})
    model = load_model(backbone, torch.float32)
    out = tmp_path / "out"
    out.mkdir()
    export(model, backbone, out, torch.float32)
    before, after = load_file(backbone / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and any("experts.3." in name for name in after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_a_model_without_memory_lacks_its_weights_and_nothing_else(model_type: str, tmp_path: Path) -> None:
    folder = make_student(tmp_path, model_type=model_type)
    empty = empty_model(folder, "eager")
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    shapes = {name: value.shape for name, value in real.named_parameters()}
    assert {name: value.shape for name, value in empty.named_parameters()} == shapes
    assert all(value.is_meta for value in empty.parameters())
    for (name, buffer), (theirs, value) in zip(empty.named_buffers(), real.named_buffers(), strict=True):
        assert name == theirs and torch.equal(buffer, value)
