"""Two models on the same questions: against scipy, statsmodels, numbers by hand, and simulations of a known truth."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from branchmerge.evaluation.paired import (
    Spread,
    compare,
    detectable,
    holm,
    questions_needed,
    samples_needed,
    spread,
)


def drawn(
    seed: int, questions: int, samples: int, shift: float, repeats: int = 1
) -> list[tuple[list[list[float]], list[list[float]]]]:
    """Right and wrong answers of two models, b's probability on a question being a's less `shift` on the mean."""
    draw = np.random.default_rng(seed)
    out = []
    for _ in range(repeats):
        ability = draw.uniform(0.25, 0.75, questions)
        gap = shift + draw.uniform(-0.2, 0.2, questions)

        def answers(p: NDArray[np.float64]) -> list[list[float]]:
            right: list[list[float]] = (draw.random((questions, samples)) < p[:, None]).astype(float).tolist()
            return right

        out.append((answers(ability), answers(ability - gap)))
    return out


def test_the_difference_and_its_error_are_those_of_a_paired_test() -> None:
    ((a, b),) = drawn(1, 40, 4, 0.1)
    found = compare(a, b)
    expected = stats.ttest_rel(np.mean(a, axis=1), np.mean(b, axis=1))
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert found.mean / found.stderr == pytest.approx(expected.statistic)
    assert found.questions == 40


def test_the_interval_is_the_percentile_bootstrap_of_questions() -> None:
    ((a, b),) = drawn(2, 40, 4, 0.1)
    d = np.mean(a, axis=1) - np.mean(b, axis=1)
    expected = stats.bootstrap(
        (d,), np.mean, n_resamples=50_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = compare(a, b)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.003)


@pytest.mark.parametrize("questions", [9, 40])
def test_the_p_value_is_that_of_swapped_names(questions: int) -> None:
    """Nine questions: all swaps; forty: random ones."""
    ((a, b),) = drawn(3, questions, 4, 0.05)
    expected = stats.permutation_test(
        (np.mean(a, axis=1), np.mean(b, axis=1)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if questions < 12 else 50_000,
        rng=np.random.default_rng(0),
    )
    assert compare(a, b).p == pytest.approx(expected.pvalue, abs=1e-9 if questions < 12 else 0.012)


def test_swapping_the_models_changes_the_sign_only() -> None:
    ((a, b),) = drawn(4, 12, 2, 0.2)
    ahead, behind = compare(a, b), compare(b, a)
    assert ahead.mean == pytest.approx(-behind.mean) and ahead.p == behind.p
    assert (ahead.low, ahead.high) == pytest.approx((-behind.high, -behind.low), abs=0.01)


def test_equal_models_do_not_differ() -> None:
    found = compare([[1.0], [0.0], [1.0]], [[1.0], [0.0], [1.0]])
    assert (found.mean, found.stderr, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_the_smallest_p_value_of_five_questions_is_that_of_two_in_32() -> None:
    assert compare([[1.0]] * 5, [[0.0]] * 5).p == 2 / 32


@settings(max_examples=20)  # each draws a whole bootstrap, too
@given(st.sampled_from([3, 6, 10]), st.data())
def test_rounding_decides_no_p_value(k: int, data: st.DataObject) -> None:
    """Shares of k samples have rounding errors; the numbers of right samples have none, so all swaps of these count."""
    right = data.draw(st.lists(st.tuples(st.integers(0, k), st.integers(0, k)), min_size=2, max_size=7))
    a, b = ([[1.0] * n[side] + [0.0] * (k - n[side]) for n in right] for side in (0, 1))
    sums = [abs(sum(s * (x - y) for s, (x, y) in zip(signs, right, strict=True))) for signs in swaps(len(right))]
    assert compare(a, b).p == pytest.approx(sum(total >= sums[0] for total in sums) / len(sums), abs=1e-12)


def test_a_difference_of_nothing_but_rounding_is_none() -> None:
    """1/10 + 2/10 - 3/10 is not zero in floating point; the three differences cancel, so every swap is as far."""
    a, b = ([[1.0] * n + [0.0] * (10 - n) for n in right] for right in ([1, 2, 0, 6, 0], [0, 0, 3, 0, 6]))
    assert compare(a, b).p == 1.0


def swaps(questions: int) -> list[tuple[int, ...]]:
    """All ways to swap two models' names question by question; the first swaps none."""
    return list(product((1, -1), repeat=questions))


def test_the_smallest_p_value_of_random_swaps_is_that_of_the_observed_one_alone() -> None:
    """Of 2^30 swaps two are as far from zero, so none of 20,000 random ones; p is never 0 (Phipson, Smyth 2010)."""
    assert compare([[1.0]] * 30, [[0.0]] * 30).p == 1 / 20_001


@pytest.mark.parametrize(("a", "b"), [(2, 3), (1, 1), (0, 0)])
def test_other_questions_are_refused(a: int, b: int) -> None:
    with pytest.raises(ValueError, match=f"{a} and {b} questions"):
        compare([[1.0]] * a, [[1.0]] * b)


def test_the_false_alarms_are_as_many_as_promised() -> None:
    ps = np.array([compare(a, b).p for a, b in drawn(5, 14, 4, 0.0, repeats=500)])
    for alpha in (0.05, 0.2):
        assert np.mean(ps <= alpha) == pytest.approx(alpha, abs=3.3 * math.sqrt(alpha * (1 - alpha) / 500))


@settings(max_examples=6)  # statsmodels collects garbage in every call
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_that_of_statsmodels(ps: list[float]) -> None:
    expected = multipletests(ps, method="holm")[1]
    assert list(holm({str(i): p for i, p in enumerate(ps)}).values()) == pytest.approx(expected.tolist(), abs=1e-12)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert list(holm({"b": 0.5, "a": 0.9})) == ["b", "a"]
    assert holm({"b": 0.5, "a": 0.9}) == {"b": 1.0, "a": 1.0}


@given(st.dictionaries(st.text(max_size=2), st.floats(0, 1), min_size=1, max_size=8))
def test_holm_adjusts_upwards_and_keeps_the_order(ps: dict[str, float]) -> None:
    adjusted = holm(ps)
    assert all(ps[name] <= adjusted[name] <= min(1.0, len(ps) * ps[name]) for name in ps)
    by_p = sorted(ps, key=lambda name: ps[name])
    assert [adjusted[name] for name in by_p] == sorted(adjusted.values())


def test_the_spread_is_found_again() -> None:
    """Gaps of the drawn models are uniform of width 0.4, so of standard deviation 0.1155."""
    ((a, b),) = drawn(6, 4000, 6, 0.1)
    found = spread(a, b)
    assert found.omega == pytest.approx(0.4 / math.sqrt(12), rel=0.06)
    assert found.sigma_a == pytest.approx(math.sqrt(0.25 - 0.25 / 12), rel=0.02)  # E p(1-p), p uniform on [1/4, 3/4]


def test_the_spread_by_hand() -> None:
    """d = 1, 0, -1/2 has the variance 7/12; a's samples vary on one question, by 1/2."""
    a, b = [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    found = spread(a, b)
    # The means of two samples vary by 1/4 on one of three questions, which is not due to the questions.
    assert found.omega == pytest.approx(math.sqrt(7 / 12 - 1 / 12))
    assert (found.sigma_a, found.sigma_b) == pytest.approx((math.sqrt(1 / 6), 0.0))


def test_a_spread_needs_two_samples() -> None:
    with pytest.raises(ValueError, match="take two or more"):
        spread([[1.0, 0.0], [1.0]], [[1.0, 0.0], [1.0, 0.0]])


def test_a_detectable_difference_is_detected_as_often_as_promised() -> None:
    known = Spread(0.4 / math.sqrt(12), math.sqrt(0.229), math.sqrt(0.22))
    difference = detectable(known, questions=60, samples=4)
    assert 0.1 < difference < 0.15
    found = [compare(a, b).p <= 0.05 for a, b in drawn(7, 60, 4, difference, repeats=150)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.1)


@settings(max_examples=50)
@given(st.floats(0.01, 0.3), st.floats(0.1, 0.5), st.integers(20, 300), st.floats(0.01, 0.3))
def test_what_is_needed_is_enough_and_one_less_is_not(
    omega: float, sigma: float, questions: int, difference: float
) -> None:
    known = Spread(omega, sigma, sigma)
    samples = samples_needed(known, questions, difference)
    if samples is None:
        assert detectable(known, questions, 10**9) >= difference * (1 - 1e-6)
    else:
        assert detectable(known, questions, samples) <= difference * (1 + 1e-6)
        assert samples == 1 or detectable(known, questions, samples - 1) >= difference * (1 - 1e-6)
    enough = questions_needed(known, 4, difference)
    assert detectable(known, enough, 4) <= difference * (1 + 1e-6)
    assert enough == 2 or detectable(known, enough - 1, 4) >= difference * (1 - 1e-6)


def test_where_nothing_varies_the_fewest_questions_and_samples_are_enough() -> None:
    """Answers that are always the same, and as far apart on every question: no noise, but a comparison takes two."""
    known = spread([[1.0, 1.0]] * 3, [[0.0, 0.0]] * 3)
    assert questions_needed(known, 2, 0.1) == 2 and samples_needed(known, 3, 0.1) == 1
