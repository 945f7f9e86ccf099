import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import sem

from branchmerge.evaluation.stats import macro_mean, mean_and_stderr

SHARES = st.floats(0, 1)


@given(st.lists(SHARES, min_size=2, max_size=60))
def test_mean_and_standard_error_agree_with_scipy(values: list[float]) -> None:
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-12)
    assert stderr == pytest.approx(sem(values), abs=1e-12)


def test_right_and_wrong_answers() -> None:
    """Three of four right: sample variance 1/4 over four values."""
    assert mean_and_stderr([1, 1, 1, 0]) == (0.75, pytest.approx(0.25))


def test_one_value_has_no_standard_error() -> None:
    mean, stderr = mean_and_stderr([0.5])
    assert mean == 0.5
    assert math.isnan(stderr)


def test_equal_values_have_no_error() -> None:
    assert mean_and_stderr([1.0, 1.0, 1.0]) == (1.0, 0.0)


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=10))
def test_macro_mean_is_unweighted_and_its_error_that_of_independent_parts(pairs: list[tuple[float, float]]) -> None:
    values, stderrs = zip(*pairs, strict=True)
    mean, stderr = macro_mean(values, stderrs)
    assert mean == pytest.approx(np.mean(values))
    assert stderr == pytest.approx(np.linalg.norm(stderrs) / len(stderrs))


def test_macro_mean_error_is_the_spread_of_drawn_means() -> None:
    """Against simulation: benchmarks drawn around their values, each with its own error."""
    values, stderrs = [0.3, 0.6, 0.8], [0.05, 0.02, 0.1]
    drawn = np.random.default_rng(0).normal(values, stderrs, size=(100_000, 3)).mean(axis=1)
    mean, stderr = macro_mean(values, stderrs)
    assert mean == pytest.approx(drawn.mean(), abs=1e-3)
    assert stderr == pytest.approx(drawn.std(), rel=0.02)
