"""Which checkpoints are fit to be a student."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_student
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from branchmerge.errors import UserError
from branchmerge.student.backbone import check_rows, check_tokenizer, context_length, load_model, load_tokenizer


@pytest.fixture
def tokenizer(tiny_student: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_student)


def test_a_tokenizer_with_template_and_end_is_accepted(tokenizer: PreTrainedTokenizerBase, tiny_student: Path) -> None:
    check_tokenizer(tokenizer, tiny_student)
    with pytest.raises(UserError):
        tokenizer.chat_template = None
        check_tokenizer(tokenizer, tiny_student)


@pytest.mark.parametrize(
    ("attribute", "said"), [("chat_template", "no chat template"), ("eos_token", "no end-of-sequence token")]
)
def test_a_tokenizer_that_lacks_one_is_refused(
    attribute: str, said: str, tokenizer: PreTrainedTokenizerBase, tiny_student: Path
) -> None:
    setattr(tokenizer, attribute, None)
    with pytest.raises(UserError, match=said):
        check_tokenizer(tokenizer, tiny_student)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 500}))
    with pytest.raises(UserError, match="512 tokens, its model only 500"):
        check_tokenizer(tokenizer, tmp_path)


def test_a_padded_vocabulary_is_fine(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    check_tokenizer(tokenizer, make_student(tmp_path / "padded", vocab_size=576))


def test_the_context_is_the_configs(tiny_student: Path, tmp_path: Path) -> None:
    assert context_length(tiny_student) == 2048
    (tmp_path / "config.json").write_text("{}")
    assert context_length(tmp_path) is None


def test_rows_longer_than_the_chunks_of_an_attention_are_refused() -> None:
    for shape in ({"attention_chunk_size": 64}, {"text_config": {"attention_chunk_size": 64}}):
        check_rows(shape, 64)
        with pytest.raises(UserError, match=r"data\.seq_len=65: the model attends within chunks of 64.*seq_len=64"):
            check_rows(shape, 65)
    check_rows({"attention_chunk_size": None}, 65)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loads_in_the_dtype_that_is_asked_for(dtype: torch.dtype, tiny_student: Path) -> None:
    weights = load_model(tiny_student, dtype).state_dict()
    stored = load_file(tiny_student / "model.safetensors")
    assert all(torch.equal(weights[name], tensor.to(dtype)) for name, tensor in stored.items())
