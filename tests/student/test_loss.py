"""The loss of a step does not depend on how the step is cut into micro-batches."""

import os
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from branchmerge.data.batch import Batch, make_batch, supervised_tokens
from branchmerge.data.template import Document
from branchmerge.student import attention, liger_loss
from branchmerge.student.backbone import load_model
from branchmerge.student.chunked_loss import summed_cross_entropy
from branchmerge.student.loss import Loss, PackedLoss, chunked_loss, fused_loss, inputs, summed_loss
from branchmerge.student.trials import choose_loss

# Learned tokens 60, 7, 33 and 3: the uneven counts with which a mean of means goes badly wrong.
SHAPES = ((70, 10), (40, 33), (50, 17), (9, 6))


def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(6)
    return [
        Document(f"d{i}", torch.randint(3, 512, (length,), generator=generator).numpy(), prompt)
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
        tokens = torch.tensor(document.tokens)[None]
        logits = plain(tokens).logits[0, document.prompt_len - 1 : -1]
        expected = expected + cross_entropy(logits, tokens[0, document.prompt_len :], reduction="sum")
    torch.testing.assert_close(loss(model, make_batch(documents(), 1)), expected)


def test_without_liger_kernel_the_chunked_loss_is_taken_with_one_warning(tiny_student: Path) -> None:
    if find_spec("liger_kernel") is not None:
        pytest.skip("liger-kernel is installed")
    packed = PackedLoss(load_model(tiny_student, torch.float32, attention.PACKED_SDPA))
    with pytest.warns(UserWarning, match="liger-kernel is not installed.*chunked loss") as told:
        choose_loss(packed, torch.device("cpu"), fused=True)
    assert packed.loss is chunked_loss and len(told) == 1


@pytest.mark.parametrize(
    ("factor", "why"),
    [((1.0, 1.0), ""), ((1.1, 1.1), "loss is 0.1 off"), ((1.0, 1.1), "hidden gradient is 0.1 off")],
    ids=["right", "wrong", "wrong gradient"],
)
def test_a_fused_kernel_is_taken_only_where_loss_and_gradients_agree(
    factor: tuple[float, float], why: str, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(*given: torch.Tensor) -> torch.Tensor:
        loss = summed_cross_entropy(*given)
        return (factor[1] * loss) + (factor[0] - factor[1]) * loss.detach()

    monkeypatch.setattr(liger_loss, "liger_cross_entropy", kernel)
    packed = PackedLoss(load_model(tiny_student, torch.float32, attention.PACKED_SDPA))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        choose_loss(packed, torch.device("cpu"), fused=True)
    assert packed.loss is (chunked_loss if why else fused_loss)
    assert [why in str(warning.message) for warning in told] == ([True] if why else [])


def test_a_row_that_teaches_nothing_is_no_work_for_liger() -> None:
    """Its kernel would divide by zero; such rows are what a process gets whose share of a step is smaller."""
    hidden, head = torch.ones(0, 4, requires_grad=True), torch.ones(7, 4, requires_grad=True)
    loss = liger_loss.liger_cross_entropy(hidden, head, torch.ones(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and head.grad is not None and not head.grad.any()


def test_liger_gives_the_chunked_loss() -> None:
    """On a CPU by Triton's interpreter, in a process of its own since Triton decides that when it is imported."""
    pytest.importorskip("liger_kernel")
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
    trial = "import torch; from branchmerge.student.liger_loss import why_not; print(repr(why_not(32, 300, *%s)))"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    code = trial % f"(torch.device('{device}'), torch.float32, 1e-4)"
    environment = {**os.environ, "TRITON_INTERPRET": str(int(device == "cpu"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "''"


def test_a_cache_is_refused(tiny_student: Path) -> None:
    """An empty one changes nothing in our attention, but transformers' own then sees the row as one document."""
    root = PackedLoss(load_model(tiny_student, torch.float32, attention.PACKED_SDPA))
    batch = make_batch([Document("a", np.arange(8), 1)], 7)

    def called(model: PreTrainedModel, batch: Batch, **changed: Any) -> torch.Tensor:
        given = {name: value for name, value in {**inputs(batch), **changed}.items() if value != "left out"}
        return model(**given).logits.sum()

    for cache in (True, "left out"):  # which then is as the model's config says
        with pytest.raises(attention.PackedRowError, match="packed rows take no cache"):
            root.compute(partial(called, use_cache=cache), batch)
    assert root(batch) > 0


@pytest.mark.parametrize("attn", [attention.PACKED_SDPA, "sdpa"])
def test_a_row_without_its_documents_bounds_is_refused(attn: str, tiny_student: Path) -> None:
    """By attention that is not ours too, which would not miss them."""
    root = PackedLoss(load_model(tiny_student, torch.float32, attn))
    batch = make_batch([Document("a", np.arange(8), 1)], 7)

    def without_bounds(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        return model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.sum()

    with pytest.raises(attention.PackedRowError, match="one row with cu_seq_lens"):
        root.compute(without_bounds, batch)
