import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.evaluation.stats import macro_mean

SHARES = st.floats(0, 1)


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
