"""bfloat16 products made of float32 ones: what they give, and that training takes them where the CPU has none."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from branches import branch, metrics
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from branchmerge import machine
from branchmerge.student.bf16_products import products_in_float32
from branchmerge.student.training import train


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


A, B, C, BIAS = drawn(37, 200), drawn(200, 65), drawn(3, 37, 200), drawn(65)
CASES: list[tuple[str, Callable[[Callable[[Tensor], Tensor]], Tensor]]] = [
    ("mm", lambda to: to(A) @ to(B)),
    ("addmm", lambda to: linear(to(A), to(B).T, to(BIAS))),
    ("bmm", lambda to: to(C) @ to(C).transpose(1, 2)),
    ("baddbmm", lambda to: torch.baddbmm(to(BIAS)[:37], to(C), to(C).transpose(1, 2), beta=0.5, alpha=2)),
]


@pytest.mark.parametrize("product", [case for _, case in CASES], ids=[name for name, _ in CASES])
def test_a_product_is_that_of_float32_rounded_once(product: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> None:
    with products_in_float32():
        found = product(lambda tensor: tensor)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, product(Tensor.float).bfloat16())
    exact, own = product(Tensor.double), product(lambda tensor: tensor)
    assert (found - exact).abs().max() <= 1.01 * (own - exact).abs().max()


def test_gradients_of_attention_are_nearer_to_the_exact_ones() -> None:
    def gradient(dtype: torch.dtype) -> Tensor:
        query = drawn(1, 4, 96, 32).to(dtype).requires_grad_()
        result = scaled_dot_product_attention(query, query * 2, query + 1, is_causal=True)
        result.double().pow(2).sum().backward()
        assert query.grad is not None
        return query.grad.double()

    exact, own = gradient(torch.float64), gradient(torch.bfloat16)
    with products_in_float32():
        found = gradient(torch.bfloat16)
    assert not torch.equal(found, own)
    assert (found - exact).norm() <= 1.05 * (own - exact).norm()


def test_float32_stays_and_so_does_bfloat16_afterwards() -> None:
    def results() -> list[Tensor]:
        return [A.float() @ B.float(), torch.ones(2, 3) @ torch.ones(3, 2)]

    before, own = results(), [A @ B, drawn(400, 300) @ drawn(300, 500)]
    with products_in_float32():
        inside = results()
    assert all(torch.equal(*pair) for pair in zip(before, inside, strict=True))
    with pytest.raises(ZeroDivisionError), products_in_float32():
        _ = 1 / 0
    assert all(torch.equal(*pair) for pair in zip(own, [A @ B, drawn(400, 300) @ drawn(300, 500)], strict=True))


def test_training_takes_them_on_a_cpu_without_bf16_instructions(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for has_instructions in (True, False):
        monkeypatch.setattr(machine, "computes_bf16", lambda _, answer=has_instructions: answer)
        outputs = tmp_path / str(has_instructions)
        train(branch(tiny_student, outputs, "domain=math", "trainer.precision=bf16-mixed", "trainer=cpu"))
        curves.append([float(row["loss"]) for row in metrics(outputs, "math")])
    own, made = curves
    assert made != own
    assert made == pytest.approx(own, rel=2e-3)
