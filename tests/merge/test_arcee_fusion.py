"""Arcee Fusion against references computed in higher precision, and its limits."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchmerge.merge.operators.arcee_fusion import ArceeFusion, importance, row_kl, threshold


def kl_to_fifty_digits(x: torch.Tensor, y: torch.Tensor) -> float:
    """KL(softmax(x) || softmax(y)) of two vectors by the definition, in 50 digits."""
    with mpmath.workdps(50):
        xs, ys = ([mpmath.mpf(float(value)) for value in vector] for vector in (x, y))
        zx, zy = (mpmath.log(mpmath.fsum(mpmath.e**value for value in vector)) for vector in (xs, ys))
        terms = (mpmath.e ** (a - zx) * ((a - zx) - (b - zy)) for a, b in zip(xs, ys, strict=True))
        return float(mpmath.fsum(terms))


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 0.3, 1.0, 30.0])
def test_row_kl_is_right_at_every_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    y = 0.03 * torch.randn(4, 300, generator=generator, dtype=torch.float64)
    x = y + scale * torch.randn(4, 300, generator=generator, dtype=torch.float64)
    expected = [kl_to_fifty_digits(a, b) for a, b in zip(x, y, strict=True)]
    assert row_kl(x, y).tolist() == pytest.approx(expected, rel=1e-9)


def test_row_kl_of_experts_like_the_papers() -> None:
    """Deltas of 3e-4 on 4096 columns: a KL near 1e-8 that float32 softmax would turn into noise."""
    generator = torch.Generator().manual_seed(2)
    y = 0.02 * torch.randn(2, 4096, generator=generator)
    x = y + 3e-4 * torch.randn(2, 4096, generator=generator)
    kl = row_kl(x.double(), y.double())
    assert kl.tolist() == pytest.approx([kl_to_fifty_digits(a, b) for a, b in zip(x, y, strict=True)], rel=1e-9)
    assert 1e-9 < float(kl.max()) < 1e-6
    naive = (x.softmax(-1) * (x.log_softmax(-1) - y.log_softmax(-1))).sum(-1)
    assert not torch.allclose(naive.double(), kl, rtol=0.01)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([5.0], [7.0]), ([3.0, 4.0], [103.0, 104.0]), ([800.0, 0.0], [800.0, 0.0])]
)
def test_row_kl_is_zero_where_the_distributions_agree(x: list[float], y: list[float]) -> None:
    assert row_kl(torch.tensor([x]).double(), torch.tensor([y]).double()).tolist() == pytest.approx([0.0], abs=1e-15)


def test_row_kl_of_huge_weights_does_not_overflow() -> None:
    x, y = torch.tensor([[0.0, 2000.0]]).double(), torch.tensor([[2000.0, 0.0]]).double()
    assert row_kl(x, y).tolist() == pytest.approx([2000.0])


def test_importance_is_row_kl_times_absolute_difference() -> None:
    left = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    right = torch.tensor([[0.1, 0.3, 0.1], [0.0, 0.5, 0.0]])
    S = importance(left, right)
    for row in range(2):
        kl = kl_to_fifty_digits(right[row], left[row])
        assert S[row].tolist() == pytest.approx((kl * (right[row] - left[row]).abs().double()).tolist(), rel=1e-6)


def test_a_vector_is_one_row() -> None:
    left, right = torch.randn(7), torch.randn(7)
    assert torch.equal(importance(left, right), importance(left[None], right[None])[0])


def test_importance_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(50, 16), torch.randn(50, 16)
    whole = importance(left, right)
    monkeypatch.setattr("branchmerge.merge.operators.arcee_fusion.BLOCK", 48)
    assert torch.equal(importance(left, right), whole)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200), st.floats(-3, 3))
@settings(max_examples=200, deadline=None)
def test_threshold_is_the_order_statistics_of_the_sorted_values(values: list[float], lam: float) -> None:
    ordered = sorted(values)
    q1, median, q3 = (ordered[math.floor(q * (len(values) - 1))] for q in (0.25, 0.5, 0.75))
    assert threshold(torch.tensor(values, dtype=torch.float64), lam) == median + lam * (q3 - q1)


def test_fusion_takes_right_where_important_and_left_elsewhere() -> None:
    """Against a reference that follows the definition line by line, in numpy."""
    generator = torch.Generator().manual_seed(3)
    left = 0.05 * torch.randn(64, 96, generator=generator)
    right = left + 1e-3 * torch.randn(64, 96, generator=generator)
    x, y = right.double().numpy(), left.double().numpy()
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (x, y))
    S = (p * np.log(p / q)).sum(-1, keepdims=True) * np.abs(y - x)
    ordered = np.sort(S, axis=None)
    q1, median, q3 = (ordered[math.floor(share * (S.size - 1))] for share in (0.25, 0.5, 0.75))
    mask = torch.from_numpy(median + 0.5 * (q3 - q1) <= S)
    merged = ArceeFusion(lam=0.5)([left, right])
    assert float((merged == torch.where(mask, right, left)).float().mean()) > 0.999
    assert 0.1 < float(mask.float().mean()) < 0.5


@pytest.mark.parametrize("lam", [-1.0, 0.0, 1.5])
def test_fusing_a_model_with_itself_is_the_identity(lam: float) -> None:
    weight = torch.randn(8, 8)
    assert torch.equal(ArceeFusion(lam)([weight, weight.clone()]), weight)


def test_infinite_lambda_keeps_left_or_takes_right() -> None:
    left, right = torch.randn(8, 8), torch.randn(8, 8)
    assert torch.equal(ArceeFusion(math.inf)([left, right]), left)
    assert torch.equal(ArceeFusion(-math.inf)([left, right]), right)


def test_a_larger_lambda_takes_less() -> None:
    left, right = torch.randn(40, 40), torch.randn(40, 40)
    taken = [int((ArceeFusion(lam)([left, right]) == right).sum()) for lam in (0.0, 0.5, 1.0, 1.5)]
    assert taken == sorted(taken, reverse=True) and taken[0] > taken[-1]


@pytest.mark.parametrize("lam", ["abc", None, math.nan])
def test_lambda_must_be_a_number(lam: object) -> None:
    with pytest.raises(ValueError, match="lam must be a number"):
        ArceeFusion(lam)  # type: ignore[arg-type]
