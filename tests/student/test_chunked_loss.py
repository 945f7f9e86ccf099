"""The chunked cross-entropy against torch's own over all logits."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from branchmerge.student import chunked_loss
from branchmerge.student.chunked_loss import summed_cross_entropy


def inputs(dtype: torch.dtype, rows: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 24, generator=draw).to(dtype).requires_grad_()
    head = torch.randn(301, 24, generator=draw).to(dtype).requires_grad_()
    return hidden, head, torch.randint(301, (rows,), generator=draw)


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, of))


@pytest.mark.parametrize(
    ("held", "compiled"),
    [(1, False), (301 * 7, False), (301 * 50, False), pytest.param(301 * 7, True, marks=pytest.mark.slow)],
)
def test_loss_and_gradients_are_those_of_whole_logits(
    held: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_loss, "CHUNK", held)
    hidden, head, labels = inputs(torch.float64)
    whole = cross_entropy(hidden @ head.T, labels, reduction="sum")
    chunked = summed_cross_entropy(hidden, head, labels, compiled)
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked.double(), whole, rtol=1e-6, atol=0)
    for found, expected in zip(gradients(chunked, hidden, head), gradients(whole, hidden, head), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow  # compiles
def test_compiled_gradient_takes_the_place_of_the_logits() -> None:
    hidden, head, labels = inputs(torch.bfloat16)
    logits = hidden.detach() @ head.detach().T
    loss, expected = chunked_loss._loss_and_gradient(logits.clone(), labels[:, None])
    compiled_loss, gradient = chunked_loss._by_compiled(logits, labels[:, None])
    assert gradient.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-6)


def test_bfloat16_is_as_near_to_the_truth_as_whole_logits_in_bfloat16() -> None:
    hidden, head, labels = inputs(torch.bfloat16, rows=2000)
    truth = cross_entropy(hidden.double() @ head.double().T, labels, reduction="sum")
    whole = cross_entropy((hidden @ head.T).float(), labels, reduction="sum")
    chunked = summed_cross_entropy(hidden, head, labels)
    assert abs((chunked - truth).item()) <= 1e-4 * truth.item()
    exact, usual, ours = (gradients(loss, hidden, head) for loss in (truth, whole, chunked))
    for a, b, c in zip(exact, usual, ours, strict=True):
        assert float((c - a).norm()) <= 1.1 * float((b - a).norm()) + 1e-3 * float(a.norm())


def test_autocast_decides_the_dtype_of_the_products() -> None:
    hidden, head, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = summed_cross_entropy(hidden, head, labels)
    expected = summed_cross_entropy(hidden.bfloat16(), head.bfloat16(), labels)
    assert torch.equal(rounded, expected)
    assert not torch.equal(rounded, summed_cross_entropy(hidden, head, labels))
    (of_head,) = gradients(rounded, head)
    assert of_head.dtype == torch.float32


def test_no_rows_and_no_gradients() -> None:
    hidden, head, labels = inputs(torch.float32, rows=0)
    loss = summed_cross_entropy(hidden, head, labels)
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(loss, hidden, head))
    with torch.no_grad():
        assert not summed_cross_entropy(*inputs(torch.float32)).requires_grad
