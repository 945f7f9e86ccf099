"""The loss of a step does not depend on how the step is cut into micro-batches."""

import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_student
from torch.nn.functional import cross_entropy

from branchmerge.data.batch import Batch, make_batch, supervised_tokens
from branchmerge.data.template import Document
from branchmerge.student import attention
from branchmerge.student.backbone import load_model
from branchmerge.student.loss import Loss, PackedLoss, chunked_loss, summed_loss

# Learned tokens 60, 7, 33 and 3: the uneven counts with which a mean of means goes badly wrong.
SHAPES = ((70, 10), (40, 33), (50, 17), (9, 6))


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(6)
    return [
        Document(f"d{i}", tuple(torch.randint(3, 512, (length,), generator=generator).tolist()), prompt)
        for i, (length, prompt) in enumerate(SHAPES)
    ]


LOSSES = pytest.mark.parametrize("loss", [summed_loss, chunked_loss])


def gradient(folder: Path, batches: list[Batch], naive: bool = False, loss: Loss = summed_loss) -> torch.Tensor:
    model = load_model(folder, torch.float32, attention.PACKED_SDPA)
    for batch in batches:
        count = batch.supervised * len(batches) if naive else batch.supervised_in_step
        (loss(model, batch) / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@LOSSES
def test_the_gradient_is_the_same_however_the_step_is_cut(tiny_student: Path, loss: Loss) -> None:
    total = sum(supervised_tokens(document) for document in documents())
    assert total == 60 + 7 + 33 + 3
    one = gradient(tiny_student, [make_batch(documents(), total)])
    halves = documents()[:2], documents()[2:]
    two = gradient(tiny_student, [make_batch(half, total) for half in halves], loss=loss)
    four = gradient(tiny_student, [make_batch([document], total) for document in documents()], loss=loss)
    for cut in (two, four):
        assert float((cut - one).norm() / one.norm()) < 1e-5


def test_the_mean_of_means_would_fail_the_same_test(tiny_student: Path) -> None:
    total = sum(supervised_tokens(document) for document in documents())
    one = gradient(tiny_student, [make_batch(documents(), total)])
    naive = gradient(tiny_student, [make_batch([document], total) for document in documents()], naive=True)
    assert float((naive - one).norm() / one.norm()) > 0.1


@LOSSES
def test_the_loss_is_the_cross_entropy_of_the_learned_tokens(tiny_student: Path, loss: Loss) -> None:
    model = load_model(tiny_student, torch.float32, attention.PACKED_SDPA)
    plain = load_model(tiny_student, torch.float32, "eager")
    expected = torch.zeros(())
    for document in documents():
        tokens = torch.tensor([document.tokens])
        logits = plain(tokens).logits[0, document.prompt_len - 1 : -1]
        expected = expected + cross_entropy(logits, tokens[0, document.prompt_len :], reduction="sum")
    torch.testing.assert_close(loss(model, make_batch(documents(), 1)), expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_the_chunked_loss_is_taken_where_the_head_is_a_matrix(model_type: str, tmp_path: Path) -> None:
    model = load_model(make_student(tmp_path, model_type=model_type), torch.float32, attention.PACKED_SDPA).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = PackedLoss(model)
        packed.choose_loss()
    assert packed.loss is chunked_loss and model.training


def test_a_head_that_scales_its_logits_keeps_the_whole_ones(tmp_path: Path) -> None:
    folder = make_student(tmp_path, model_type="granite", logits_scaling=8.0)
    model = load_model(folder, torch.float32, attention.PACKED_SDPA)
    with pytest.warns(UserWarning, match="Granite.*: its output head is not a plain matrix"):
        packed = PackedLoss(model)
        packed.choose_loss()
    assert packed.loss is summed_loss
