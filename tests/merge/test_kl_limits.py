"""Where Arcee Fusion changes from one series, loop or precision to another: both sides of each limit, in 100 digits."""

import math

import numpy as np
import pytest
import torch
from test_arcee_fusion import kl_to_100_digits, reference

from branchmerge.merge.operators import row_kl
from branchmerge.merge.operators.arcee_fusion import ArceeFusion


def of_the_operator(right: torch.Tensor, left: torch.Tensor, precision: str = "exact") -> float:
    (kl,) = ArceeFusion(precision=precision).measure([left[None], right[None]]).kl.tolist()
    return float(kl)


@pytest.mark.parametrize("precision", ["exact", "float64"])
@pytest.mark.parametrize(
    ("weight", "difference", "shift"),
    [
        # The largest weight of the short series, and of float32.
        *[(weight, 1e-3, 0.0) for weight in (0.33, 0.35, 0.6, 0.9, 2.0, 39.0, 41.0, 79.0)],
        # The largest difference of the short series, and of any.
        *[(0.3, difference, 0.0) for difference in (0.0155, 0.0157, 0.1, 0.3, 0.49, 0.51, 1.9)],
        # The smallest difference whose square float32 holds.
        *[(10 * difference, difference, 0.0) for difference in (1e-13, 2e-15, 5e-16, 1e-17, 1e-19, 1e-21, 1e-23)],
        # The mean of the differences, which is taken off by a series where it is small.
        *[(0.1, 0.012, shift) for shift in (0.0, 0.003, 0.009, -0.009, 0.011, -0.011, 0.03)],
        # So large a mean beside the rest that what it is taken off from cancels.
        *[(0.1, difference, 0.3) for difference in (1e-3, 3e-3, 0.01, 0.03, 0.1)],
    ],
)
def test_row_kl_on_both_sides_of_each_limit(precision: str, weight: float, difference: float, shift: float) -> None:
    """Weights of both signs at their largest, where a series that is cut off too early is wrong in two ways; those of
    one sign differ more, so that it shows how both weigh."""
    draw = torch.Generator().manual_seed(1)
    signs = torch.randint(2, (1100,), generator=draw) * 2.0 - 1.0
    right = weight * signs
    left = right - shift - difference * (2 * torch.rand(1100, generator=draw) - 1) * torch.where(signs < 0, 1.0, 0.1)
    expected = kl_to_100_digits(right, left)
    assert of_the_operator(right, left, precision) == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("difference", [1e-24, 1e-25, 1e-30])
def test_scores_too_small_for_float32_are_computed_in_float64(difference: float) -> None:
    """Though their rows' KL is a float32 when scaled, its product with a difference is none."""
    draw = torch.Generator().manual_seed(2)
    left = torch.zeros(40, 100)
    right = difference * torch.randn(40, 100, generator=draw)
    exact, whole = (ArceeFusion(lam=0.5, precision=precision) for precision in ("exact", "float64"))
    measured, known = (operator.measure([left, right]) for operator in (exact, whole))
    assert known.quartiles[0] > 0
    assert measured.quartiles == pytest.approx(known.quartiles, rel=1e-5, abs=0)
    assert torch.equal(exact([left, right]), whole([left, right]))
    assert 0.05 < float((exact([left, right]) != left).double().mean()) < 0.5


@pytest.mark.parametrize("columns", [1500, 2049, 1025, 1054, 33])
@pytest.mark.parametrize("delta", ["absolute", "signed"])
def test_the_end_of_a_row_is_not_counted_twice(columns: int, delta: str) -> None:
    """Rows are cut into chunks, and what a chunk does not fill holds values of the one before."""
    draw = torch.Generator().manual_seed(3)
    left = torch.randn(2000, columns, generator=draw)[: 400_000 // columns]
    right = left + 1e-3 * torch.randn(left.shape, generator=draw)
    operator = ArceeFusion(lam=0.5, delta=delta)
    merged, expected = reference(left, right, operator)
    assert list(operator.measure([left, right]).quartiles) == expected
    assert torch.equal(operator([left, right]), merged)


def test_a_row_longer_than_a_block_is_summed_over_all_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(4)
    for scale in (1e-3, 1.0, 20.0):
        left = torch.randn(3, 1000, generator=draw)
        right = left + scale * torch.randn(3, 1000, generator=draw)
        expected = [kl_to_100_digits(a, b) for a, b in zip(right, left, strict=True)]
        for block in (64, 999, 1 << 20):
            monkeypatch.setattr(row_kl, "BLOCK", block)
            assert row_kl.kl_of_rows(right, left).tolist() == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_a_shift_of_a_whole_row_leaves_the_other_rows_scores(shift: float) -> None:
    """Its own are the KL of what is left of its differences, times the shift."""
    left = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    right = left + torch.tensor([[0.0, 0.5, 0.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]])
    right[2] += shift
    S = [kl_to_100_digits(right[row], left[row]) * (right[row] - left[row]).abs().double().numpy() for row in range(3)]
    q1, median, q3 = (np.sort(np.concatenate(S))[math.floor(q * 8)] for q in (0.25, 0.5, 0.75))
    found = ArceeFusion().measure([left, right]).quartiles
    assert found == pytest.approx((q1, median, q3), rel=1e-5, abs=1e-12)
