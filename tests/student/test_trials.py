"""What is tried before training: documents of a row that see each other, and heads that are more than a matrix."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from branches import branch
from conftest import make_student

from branchmerge.errors import UserError
from branchmerge.student import attention
from branchmerge.student.backbone import load_model
from branchmerge.student.loss import PackedLoss, chunked_loss, summed_loss
from branchmerge.student.training import train
from branchmerge.student.trials import check_apart, check_masks, choose_loss

PRECISIONS = pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
MATRICES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "mixtral", "gpt2")
LEAKING: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {},
    # Whose positions are places in the row, or count from the number after that of the padding.
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "roberta": {"is_decoder": True},
}
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "head_dim": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "exaone4": {"sliding_window": 8, "num_hidden_layers": 4},
}
MASKED: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1, "num_experts": 4, "moe_intermediate_size": 16},
    "phimoe": {"num_local_experts": 4},
}
"""Kinds whose window is in transformers' mask only"""


def packed(folder: Path, model_type: str, **changes: Any) -> PackedLoss:
    student = make_student(folder / model_type, model_type=model_type, **changes)
    return PackedLoss(load_model(student, torch.float32, attention.PACKED_SDPA))


def tried(student: PackedLoss, compute: torch.dtype) -> list[str]:
    """Both trials in a precision; the warnings."""
    with (
        warnings.catch_warnings(record=True) as told,
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16),
    ):
        warnings.simplefilter("always")
        check_apart(student, torch.device("cpu"), compute)
        check_masks(student, torch.device("cpu"))
        choose_loss(student, torch.device("cpu"), compute)
    return [str(warning.message) for warning in told if "head" in str(warning.message)]


@PRECISIONS
@pytest.mark.parametrize("model_type", MATRICES)
def test_the_chunked_loss_is_taken_where_the_head_is_a_matrix(
    model_type: str, compute: torch.dtype, tmp_path: Path
) -> None:
    student = packed(tmp_path, model_type, **({"head_dim": 8} if model_type == "gemma3_text" else {}))
    assert tried(student, compute) == []
    assert student.loss is chunked_loss


@PRECISIONS
@pytest.mark.parametrize(
    ("model_type", "changes", "why"),
    [
        ("granite", {"logits_scaling": 8.0}, " for "),
        ("cohere", {}, " for "),
        ("gemma2", {"head_dim": 8}, " for "),  # caps logits at 30, far above those of this model
        ("phi", {}, "it has a bias"),  # which is zero as yet
    ],
)
def test_other_heads_keep_the_whole_logits(
    model_type: str, changes: dict[str, Any], why: str, compute: torch.dtype, tmp_path: Path
) -> None:
    student = packed(tmp_path, model_type, **changes)
    (told,) = tried(student, compute)
    assert "its output head is not a plain matrix" in told and why in told
    assert student.loss is summed_loss


@PRECISIONS
@pytest.mark.parametrize("model_type", LEAKING)
def test_models_in_which_documents_see_each_other_are_refused(
    model_type: str, compute: torch.dtype, tmp_path: Path
) -> None:
    student = packed(tmp_path, model_type, **LEAKING[model_type])
    with pytest.raises(UserError, match="in a packed row a document sees the one before it"):
        tried(student, compute)


@pytest.mark.parametrize("model_type", WINDOWED)
def test_a_window_that_attention_is_told_of_is_fine(model_type: str, tmp_path: Path) -> None:
    student = packed(tmp_path, model_type, **WINDOWED[model_type])
    check_masks(student, torch.device("cpu"))
    assert attention.AttentionInterface()[attention.PACKED_SDPA] is attention.packed_sdpa


@pytest.mark.parametrize("model_type", MASKED)
def test_a_window_that_only_a_mask_has_is_refused(model_type: str, tmp_path: Path) -> None:
    short = packed(tmp_path / "short", model_type, **MASKED[model_type], sliding_window=8)
    with pytest.raises(UserError, match="looks back over a window of 8 tokens that its layers do not tell"):
        check_masks(short, torch.device("cpu"))
    whole = packed(tmp_path / "whole", model_type, **MASKED[model_type], sliding_window=2048)  # all that it reads
    check_masks(whole, torch.device("cpu"))


def test_a_model_whose_tokens_see_the_ones_after_them_is_refused(tmp_path: Path) -> None:
    student = packed(tmp_path, "gemma3_text", head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="Gemma3ForCausalLM: its tokens see the ones after them"):
        check_masks(student, torch.device("cpu"))


def test_weights_that_are_no_numbers_are_the_first_steps_affair(tmp_path: Path) -> None:
    student = packed(tmp_path, "llama")
    with torch.no_grad():
        student.model.base_model.norm.weight.fill_(torch.nan)
    assert tried(student, torch.float32) == []


def test_a_branch_of_such_a_model_never_starts(tmp_path: Path) -> None:
    folder = make_student(tmp_path / "lfm2", model_type="lfm2", **LEAKING["lfm2"])
    with pytest.raises(UserError, match="Lfm2ForCausalLM: in a packed row a document sees the one before it"):
        train(branch(folder, tmp_path, "domain=math"))
    assert not (tmp_path / "tiny" / "experts" / "math").exists()


def test_a_model_whose_attention_cannot_be_replaced_is_refused_in_a_line(tmp_path: Path) -> None:
    folder = make_student(tmp_path / "gpt_oss", model_type="gpt_oss")
    with pytest.raises(UserError, match="gpt_oss: this kind of model cannot train on packed rows"):
        train(branch(folder, tmp_path, "domain=math"))
