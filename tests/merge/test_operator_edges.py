"""Where an operator's formula stops holding, or rounding would decide: numbers by hand."""

import math

import pytest
import torch

from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.operators.arcee_fusion_mergekit import SAMPLE, ArceeFusionMergekit, _sample
from branchmerge.merge.operators.karcher import Karcher
from branchmerge.merge.operators.model_stock import ModelStock
from branchmerge.merge.operators.slerp import Slerp


def test_model_stock_of_directions_that_cancel_is_the_backbone() -> None:
    """Three at 120 degrees: cos = -1/2, so t = 3 cos / (1 + 2 cos) has a divisor that is zero up to rounding."""
    base = torch.tensor([5.0, 7.0], dtype=torch.float64)
    angles = [0.1 + 2 * math.pi * i / 3 for i in range(3)]
    models = [base + torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) for a in angles]
    assert ModelStock().measure(models, base) == 0.0
    assert ModelStock()(models, base).tolist() == [5.0, 7.0]


def test_karcher_leaves_tensors_of_zeros_out() -> None:
    """They have no direction; nor do they shrink the mean norm, here that of 3 and 5."""
    a, b, nothing = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0]), torch.zeros(2)
    diagonal = 4 / math.sqrt(2)
    assert Karcher()([a, nothing, b, nothing]).tolist() == pytest.approx([diagonal, diagonal])
    assert Karcher()([nothing, nothing]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("cosine", "on_the_arc"), [(0.9990, True), (0.9994, True), (0.9996, False), (-0.9, True)])
def test_slerp_leaves_the_arc_above_a_cosine_of_09995(cosine: float, on_the_arc: bool) -> None:
    """Half-way between two unit vectors, the arc has a point of norm 1, the line one of norm cos(angle / 2)."""
    left = torch.tensor([1.0, 0.0], dtype=torch.float64)
    right = torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)
    expected = 1.0 if on_the_arc else math.cos(math.acos(cosine) / 2)
    assert float(Slerp(t=0.5)([left, right]).norm()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [SAMPLE + 1, 4 * SAMPLE])
def test_mergekits_sample_of_a_large_tensor_takes_no_element_twice(n: int) -> None:
    """As a permutation's beginning; with repetition, more than a tenth would be there twice."""
    S = torch.arange(n, dtype=torch.float64)
    found = _sample(S, torch.Generator().manual_seed(1))
    assert len(found) == SAMPLE == len(found.unique())
    assert not torch.equal(found.sort().values, S[:SAMPLE])
    # Each quartile's rank among n has the standard deviation of sampling without repetition.
    for q in (0.25, 0.5, 0.75):
        off = float(found.sort().values[int(q * (SAMPLE - 1))]) - q * n
        assert abs(off) < 2 + 5 * n * math.sqrt(q * (1 - q) / SAMPLE * (1 - SAMPLE / n))


def test_a_million_elements_are_not_sampled() -> None:
    """mergekit's condition is "more than 1e6"; the goldens of tests/parity are smaller."""
    draw = torch.Generator().manual_seed(1)
    assert torch.equal(_sample(torch.arange(1_000_000), draw), torch.arange(1_000_000))
    assert len(_sample(torch.arange(1_000_001), draw)) == 1_000_000


def test_mergekits_median_and_quartiles_are_of_two_samples() -> None:
    """Of one sample, the three would all be shifted alike; the median's sample is drawn first, with the same seed."""
    left, right = torch.zeros(1100, 1000), torch.rand(1100, 1000, generator=torch.Generator().manual_seed(3))
    S, (q1, median, q3) = ArceeFusionMergekit(seed=5).measure([left, right])
    draw = torch.Generator().manual_seed(5)
    first, second = (_sample(S, draw).sort().values for _ in range(2))
    assert float(median) == float(first[(SAMPLE - 1) // 2])
    assert [float(q1), float(q3)] == [float(second[int(q * (SAMPLE - 1))]) for q in (0.25, 0.75)]
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("gate", "lam", "taken"), [("gt", 1 - 2**-30, True), ("ge", 1 + 2**-30, False)])
def test_a_threshold_that_float32_does_not_hold_decides_as_it_is(gate: str, lam: float, taken: bool) -> None:
    """S is 0, 1, 2, 3, 4, so T = 2 + 2 lam is 2^-29 beside the last one, and in float32 it would be that one."""
    left, right = torch.zeros(5), torch.arange(5.0)
    assert ArceeFusion(lam=lam, gate=gate)([left, right]).tolist() == [0.0, 0.0, 0.0, 0.0, 4.0 if taken else 0.0]
