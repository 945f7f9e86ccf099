"""A model's mean and its error: against scipy and statsmodels, and against simulation of a truth that is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, sem, ttest_1samp
from statsmodels.api import OLS

from branchmerge.evaluation.stats import estimate

SHARES = st.floats(0, 1)


@given(st.lists(st.lists(SHARES, min_size=1, max_size=5), min_size=2, max_size=30))
def test_the_question_is_the_cluster(scores: list[list[float]]) -> None:
    means = [np.mean(samples) for samples in scores]
    found = estimate(scores)
    assert found.mean == pytest.approx(np.mean(means), abs=1e-12)
    assert found.stderr == pytest.approx(sem(means), abs=1e-12)
    assert (found.questions, found.samples) == (len(scores), sum(map(len, scores)))


def test_the_error_is_that_of_a_clustered_regression() -> None:
    scores = np.random.default_rng(5).random((12, 4))
    questions = np.repeat(np.arange(12), 4)
    fitted = OLS(scores.ravel(), np.ones(48)).fit(cov_type="cluster", cov_kwds={"groups": questions})
    found = estimate(scores.tolist())
    assert (found.mean, found.stderr) == pytest.approx((fitted.params[0], fitted.bse[0]), rel=1e-10)


def test_the_interval_is_students() -> None:
    scores = [[0.2, 0.4], [0.5, 0.7], [0.4, 0.6], [0.3, 0.3]]
    found = estimate(scores, confidence=0.9)
    expected = ttest_1samp([np.mean(samples) for samples in scores], 0).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_intervals_stay_within_the_possible() -> None:
    found = estimate([[1.0], [1.0], [1.0], [0.0]])
    assert found.high == 1.0 and 0 <= found.low < 0.75


@pytest.mark.parametrize("passed", [0, 1])
def test_all_wrong_or_all_right_is_not_certain(passed: int) -> None:
    found = estimate([[float(passed)] * 4] * 30)
    exact = binomtest(30 * passed, 30).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    assert found.stderr == 0.0


def test_one_question_says_nothing_of_others() -> None:
    found = estimate([[0.0, 1.0]])
    assert found.mean == 0.5 and math.isnan(found.stderr) and (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], []]])
def test_without_samples_there_is_no_mean(scores: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="no question, or one without samples"):
        estimate(scores)


def test_one_sample_a_question_leaves_the_parts_unknown() -> None:
    found = estimate([[1.0], [0.0], [1.0]])
    assert found.stderr == pytest.approx(sem([1, 0, 1]))
    assert math.isnan(found.stderr_sampling) and math.isnan(found.stderr_question)


def test_an_aime_like_case_against_simulation() -> None:
    """30 questions, 16 samples, ability on a question drawn from a wide beta: the naive binomial error is a third."""
    draw = np.random.default_rng(0)
    mean, variance = 0.7, 0.113  # of a question's probability
    concentration = mean * (1 - mean) / variance - 1
    ability = draw.beta(mean * concentration, (1 - mean) * concentration, size=(3000, 30))
    right = draw.random((3000, 30, 16)) < ability[:, :, None]
    found = [estimate(run.astype(float).tolist()) for run in right]
    true_sd = right.mean(axis=(1, 2)).std()
    assert true_sd == pytest.approx(0.063, abs=0.002)
    assert np.mean([e.stderr for e in found]) == pytest.approx(true_sd, rel=0.04)
    assert math.sqrt(mean * (1 - mean) / 480) == pytest.approx(0.021, abs=0.001)
    assert 0.925 < np.mean([e.low <= mean <= e.high for e in found]) < 0.965
    sampling = math.sqrt((ability * (1 - ability)).mean() / 16 / 30)
    assert np.mean([e.stderr_sampling for e in found]) == pytest.approx(sampling, rel=0.02)
    question = np.mean([e.stderr_question for e in found])
    assert question == pytest.approx(math.sqrt(variance / 30), rel=0.05)
