"""Arcee Fusion against references computed in higher precision, and its limits."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchmerge.merge import selection_kernels as kernels
from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.operators.quartiles import sum_of_counts
from branchmerge.merge.threads import workers


def kl_to_100_digits(x: torch.Tensor, y: torch.Tensor) -> float:
    """KL(softmax(x) || softmax(y)) of two vectors by the definition, in 100 digits."""
    with mpmath.workdps(100):
        xs, ys = ([mpmath.mpf(float(value)) for value in vector] for vector in (x, y))
        zx, zy = (mpmath.log(mpmath.fsum(mpmath.e**value for value in vector)) for vector in (xs, ys))
        terms = (mpmath.e ** (a - zx) * ((a - zx) - (b - zy)) for a, b in zip(xs, ys, strict=True))
        return float(mpmath.fsum(terms))


def kl_of(precision: str, right: torch.Tensor, left: torch.Tensor) -> list[float]:
    return ArceeFusion(precision=precision).measure([left, right]).kl.tolist()


BOTH = pytest.mark.parametrize("precision", ["exact", "float64"])


@BOTH
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e-4, 1e-2, 0.3, 1.0, 30.0, 300.0])
def test_row_kl_is_right_at_every_scale(precision: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    left = min(scale, 1.0) * torch.randn(4, 1300, generator=generator)
    right = left + scale * torch.randn(4, 1300, generator=generator)
    expected = [kl_to_100_digits(a, b) for a, b in zip(right, left, strict=True)]
    assert kl_of(precision, right, left) == pytest.approx(expected, rel=1e-5, abs=0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_kl_of_experts_like_the_papers(precision: str, dtype: torch.dtype) -> None:
    """Deltas of 3e-4 on 4096 columns: a KL near 1e-8 that float32 softmax would turn into noise."""
    generator = torch.Generator().manual_seed(2)
    left = 0.02 * torch.randn(2, 4096, generator=generator)
    right = (left + 3e-4 * torch.randn(2, 4096, generator=generator)).to(dtype)
    left = left.to(dtype)
    expected = [kl_to_100_digits(a, b) for a, b in zip(right, left, strict=True)]
    assert kl_of(precision, right, left) == pytest.approx(expected, rel=1e-6, abs=0)
    assert 1e-9 < max(expected) < 1e-6
    assert kl_of("float32", right, left) != pytest.approx(expected, rel=0.01, abs=0)


@BOTH
@pytest.mark.parametrize("shift", [1e-3, 0.3, 5.0])
def test_a_row_that_is_shifted_as_a_whole_keeps_its_small_kl(precision: str, shift: float) -> None:
    """Softmax does not see the shift, but it dwarfs the differences that count."""
    generator = torch.Generator().manual_seed(3)
    left = 0.1 * torch.randn(3, 900, generator=generator)
    right = left + shift + 1e-4 * torch.randn(3, 900, generator=generator)
    expected = [kl_to_100_digits(a, b) for a, b in zip(right, left, strict=True)]
    assert kl_of(precision, right, left) == pytest.approx(expected, rel=1e-5, abs=0)


@BOTH
@pytest.mark.parametrize("outlier", [0.4, 0.6, 3.0, 45.0, 200.0])
def test_one_large_weight_does_not_spoil_its_row(precision: str, outlier: float) -> None:
    generator = torch.Generator().manual_seed(4)
    left = 0.02 * torch.randn(2, 2000, generator=generator)
    right = left + 1e-4 * torch.randn(2, 2000, generator=generator)
    left[0, 5], right[1, 7] = -outlier, outlier
    expected = [kl_to_100_digits(a, b) for a, b in zip(right, left, strict=True)]
    assert kl_of(precision, right, left) == pytest.approx(expected, rel=1e-5, abs=0)


@BOTH
@given(data=st.data(), columns=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_row_kl_of_any_row(precision: str, data: st.DataObject, columns: int) -> None:
    row = st.lists(st.floats(-60, 60, width=32), min_size=columns, max_size=columns)
    right, left = (torch.tensor([data.draw(row)]) for _ in range(2))
    expected = kl_to_100_digits(right[0], left[0])
    assert kl_of(precision, right, left) == pytest.approx([expected], rel=1e-5, abs=1e-15)


@BOTH
@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [1.0, 2.0]), ([5.0], [7.0]), ([3.0, 4.0], [103.0, 104.0]), ([800.0, 0.0], [800.0, 0.0])]
)
def test_row_kl_is_zero_where_the_distributions_agree(precision: str, x: list[float], y: list[float]) -> None:
    assert kl_of(precision, torch.tensor([x]), torch.tensor([y])) == pytest.approx([0.0], abs=1e-15)


@BOTH
def test_row_kl_of_huge_weights_does_not_overflow(precision: str) -> None:
    assert kl_of(precision, torch.tensor([[0.0, 2000.0]]), torch.tensor([[2000.0, 0.0]])) == pytest.approx([2000.0])


@BOTH
@pytest.mark.parametrize("kl", ["row", "tensor"])
@pytest.mark.parametrize("columns", [3, 1500])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("differs", [False, True])
def test_a_number_that_is_none_in_both_models_shows(
    precision: str, kl: str, columns: int, value: float, differs: bool
) -> None:
    """Also where the rows are equal otherwise: infinity is in both, so nothing else tells of it."""
    left = torch.randn(4, columns)
    left[2, 1] = value
    right = left + 0.01 if differs else left.clone()
    operator = ArceeFusion(kl=kl, precision=precision)
    assert not operator.shows_finite(operator.measure([left, right]))


def test_the_other_direction_exchanges_the_two() -> None:
    left, right = torch.randn(4, 30), torch.randn(4, 30)
    there = ArceeFusion(direction="left_right").measure([left, right])
    assert there.kl.tolist() == pytest.approx(kl_of("exact", left, right))


@BOTH
def test_the_kl_of_a_tensor_is_that_of_its_elements_in_one_row(precision: str) -> None:
    left, right = torch.randn(4, 30), torch.randn(4, 30)
    kl = ArceeFusion(kl="tensor", precision=precision).measure([left, right]).kl
    assert kl.tolist() == pytest.approx(kl_of(precision, right.reshape(1, -1), left.reshape(1, -1)) * 4)


def test_a_vector_is_one_row() -> None:
    left, right = torch.randn(7), torch.randn(7)
    whole, row = ArceeFusion()([left, right]), ArceeFusion()([left[None], right[None]])
    assert whole.shape == (7,) and torch.equal(whole, row[0])


def reference(left: torch.Tensor, right: torch.Tensor, operator: ArceeFusion) -> tuple[torch.Tensor, list[float]]:
    """Merged tensor and quartiles by the definition, from the operator's own KL and a sort of all S."""
    d = left.double() - right.double()
    kl = torch.tensor(operator.measure([left, right]).kl).reshape(-1, 1)
    if len(kl) == 1:  # one factor for all: left out
        kl = kl.sign()
    S = kl * (d if operator.delta == "signed" else d.abs())
    if operator.precision == "exact":  # rounded to float32, of a larger exponent
        S = ((kl * 2.0**96).float() * (d if operator.delta == "signed" else d.abs()).float()).double() / 2.0**96
    ordered = sorted(S.flatten().tolist())
    q1, median, q3 = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    T = median + operator.lam * (q3 - q1)
    return torch.where(S > T if operator.gate == "gt" else S >= T, right, left), [q1, median, q3]


@BOTH
@pytest.mark.parametrize("shape", [(3, 5), (700, 513), (1, 300_000), (300_000, 1)])
@pytest.mark.parametrize("delta", ["absolute", "signed"])
@pytest.mark.parametrize("equal", [0.0, 0.3, 0.9])
def test_the_threshold_is_exact_and_the_gate_follows_it(
    precision: str, shape: tuple[int, int], delta: str, equal: float
) -> None:
    """Above SMALL elements quartiles come from a histogram; many equal weights make many scores zero."""
    generator = torch.Generator().manual_seed(5)
    left = (0.05 * torch.randn(shape, generator=generator)).bfloat16()
    right = (left.float() + 1e-3 * torch.randn(shape, generator=generator)).bfloat16()
    right = torch.where(torch.rand(shape, generator=generator) < equal, left, right)
    for gate in ("ge", "gt"):
        operator = ArceeFusion(lam=0.5, delta=delta, gate=gate, precision=precision)
        merged, expected = reference(left, right, operator)
        assert list(operator.measure([left, right]).quartiles) == expected
        assert torch.equal(operator([left, right]), merged)


def taken_in_rational_arithmetic(
    left: torch.Tensor, right: torch.Tensor, lam: float, signed: bool, strict: bool
) -> torch.Tensor:
    """The mask where one KL, above zero, covers the whole tensor: it is divided out, the rest is in fractions."""
    d = left.double() - right.double()
    d = d if signed else d.abs()
    ordered = d.flatten().sort().values
    q1, median, q3 = (Fraction(float(ordered[math.floor(q * (d.numel() - 1))])) for q in (0.25, 0.5, 0.75))
    T = median + Fraction(lam) * (q3 - q1)
    values, places = d.unique(return_inverse=True)
    passes = [Fraction(value) > T or (Fraction(value) == T and not strict) for value in values.tolist()]
    return torch.tensor(passes)[places]


def bfloat16_experts(seed: int, shape: tuple[int, ...], mean: float, delta: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = mean + 0.02 * torch.randn(shape, generator=generator)
    return [(base + delta * torch.randn(shape, generator=generator)).bfloat16() for _ in range(2)]


@BOTH
@pytest.mark.parametrize("lam", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(
    ("shape", "mean", "delta", "parameters"),
    [
        ((4096,), 1.0, 3e-3, {}),  # a norm
        ((1, 40_000), 0.0, 3e-4, {"gate": "gt"}),
        ((128, 512), 0.0, 3e-4, {"kl": "tensor", "direction": "left_right", "delta": "signed", "gate": "gt"}),
        ((20, 512), 0.0, 3e-4, {"kl": "tensor"}),
    ],
)
def test_a_kl_that_is_common_to_all_elements_decides_nothing(
    precision: str, lam: float, shape: tuple[int, ...], mean: float, delta: float, parameters: dict[str, str]
) -> None:
    """Differences of bfloat16 models take few values: where T is one of them, rounding would decide for thousands."""
    operator = ArceeFusion(lam, precision=precision, **parameters)
    at_threshold = 0
    for seed in range(25):
        left, right = bfloat16_experts(seed, shape, mean, delta)
        signed = operator.delta == "signed"
        at_least, above = (taken_in_rational_arithmetic(left, right, lam, signed, strict) for strict in (False, True))
        expected = above if operator.gate == "gt" else at_least
        at_threshold += bool((at_least != above).any())
        assert torch.equal(operator([left, right]), torch.where(expected, right, left)), seed
    assert at_threshold


@BOTH
@pytest.mark.parametrize("lam", [1.5, math.inf])
def test_facts_tell_the_scores_with_a_common_kl(precision: str, lam: float) -> None:
    left, right = bfloat16_experts(1, (4096,), 1.0, 3e-3)
    operator = ArceeFusion(lam, precision=precision)
    facts = operator.facts(operator.measure([left, right]))
    S = sorted((kl_to_100_digits(right, left) * (left.double() - right.double()).abs()).tolist())
    q1, median, q3 = (S[math.floor(q * 4095)] for q in (0.25, 0.5, 0.75))
    expected = {"S_q1": q1, "S_median": median, "S_q3": q3, "T": median + lam * (q3 - q1)}
    assert {key: facts[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=0)
    assert facts["kl_min"] == facts["kl_max"] == pytest.approx(kl_to_100_digits(right, left), rel=1e-5, abs=0)


@pytest.mark.parametrize("shape", [(3, 5), (300, 513), (7000,)])
def test_float16_is_fused_as_the_float32_of_the_same_values(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    left = (0.02 * torch.randn(shape, generator=generator)).half()
    right = (left.float() + 3e-4 * torch.randn(shape, generator=generator)).half()
    before = left.clone(), right.clone()
    operator = ArceeFusion(lam=0.5)
    measured, in_float32 = operator.measure([left, right]), operator.measure([left.float(), right.float()])
    assert measured.compiled and measured.quartiles == in_float32.quartiles
    merged, taken, change = operator.fuse(measured, [left.numpy(), right.numpy()], spare=np.empty(shape, np.float16))
    expected, *told = operator.fuse(in_float32, [left.float().numpy(), right.float().numpy()])
    assert merged.dtype == np.float16 and np.array_equal(merged, expected)
    assert [taken, change] == told and 0 < taken < left.numel()
    assert torch.equal(left, before[0]) and torch.equal(right, before[1])


@pytest.mark.parametrize("delta", ["absolute", "signed"])
def test_scores_at_the_end_of_float32_are_told_apart_from_zero(delta: str) -> None:
    """Scaled scores of some 50 times the smallest float32: their leading bits are those of zero."""
    left = torch.zeros(40, 1000)
    right = 3e-24 * torch.randn(40, 1000, generator=torch.Generator().manual_seed(5))
    right[0] *= 1e4
    right[1:10] = 0
    operator = ArceeFusion(delta=delta)
    kl = operator.measure([left, right]).kl
    S = np.empty((40, 1000), np.float32)
    kernels.scores(right.numpy(), left.numpy(), kl, delta == "signed", S)
    places = [math.floor(q * (S.size - 1)) for q in (0.25, 0.5, 0.75)]
    expected = np.sort(S, axis=None)[places].astype(np.float64) / kernels.SCALE
    assert 0 < expected[2] < 2.0**-134 / kernels.SCALE
    assert operator.measure([left, right]).quartiles == pytest.approx(expected.tolist(), rel=0, abs=0)


@pytest.mark.parametrize("equal", [1 << 31, 3 << 31])
def test_more_equal_elements_than_32_bits_count(equal: int) -> None:
    """Counts as of a tensor of many gigabytes, with a few scores above its zeros."""
    parts = [np.zeros(kernels.KEYS, np.int32) for _ in range(equal >> 30)]
    for counts in parts:
        counts[kernels.ZERO] = 1 << 30
    parts[0][kernels.ZERO + 5] = 10
    total = sum_of_counts(parts)
    assert total.sum() == equal + 10
    located = kernels.locate(total, np.array([equal // 2, equal - 1, equal]))
    assert located.tolist() == [[kernels.ZERO, 0, equal], [kernels.ZERO, 0, equal], [kernels.ZERO + 5, equal, 10]]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_part_of_a_tensor_is_more_than_32_bits_count(threads: int) -> None:
    before = workers.count
    try:
        workers.use(threads)
        parts = workers.share(lambda part: part, 9_000_000, 1024)
    finally:
        workers.use(before)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == 9_000_000
    assert max(part.stop - part.start for part in parts) * 1024 < 1 << 31


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    left = torch.randn(900, 700)
    right = left + 1e-3 * torch.randn(900, 700)
    before = workers.count
    try:
        results = []
        for count in (1, 2, 3, 7):
            workers.use(count)
            results.append(ArceeFusion(0.5)([left, right]))
    finally:
        workers.use(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])
    assert 0 < int((results[0] == right).sum()) < left.numel()


@pytest.mark.parametrize("rounding", ["float32", "bfloat16"])
def test_low_precision_shows_what_rounding_does(rounding: str) -> None:
    """PAPER.md: softmax then logarithm at these dtypes picks largely other coordinates."""
    generator = torch.Generator().manual_seed(6)
    left = 0.02 * torch.randn(256, 4096, generator=generator)
    right = left + 3e-4 * torch.randn(256, 4096, generator=generator)
    exact, rounded, reference = (
        ArceeFusion(precision=precision)([left, right]) == right for precision in ("exact", rounding, "float64")
    )
    assert float((exact & reference).sum() / (exact | reference).sum()) >= 0.999
    assert float((rounded & reference).sum() / (rounded | reference).sum()) < 0.7


@pytest.mark.parametrize("name", ["kl", "direction", "delta", "gate", "precision"])
def test_a_choice_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        ArceeFusion(**{name: "both"})


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
