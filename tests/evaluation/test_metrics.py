"""pass@k and maj@k against counting all cases."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.evaluation.metrics import avg_at_k, maj_at_k, pass_at_k


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    draws = list(combinations(correct, k))
    assert pass_at_k(correct, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))
    assert pass_at_k(correct, 1) == pytest.approx(avg_at_k(correct))


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs {k} samples of each question, there are 2"):
        pass_at_k([True, False], k)


def test_the_majority_decides() -> None:
    assert maj_at_k(["204", "7", "204"], [True, False, True]) == 1.0
    assert maj_at_k(["7", "7", "204"], [False, False, True]) == 0.0


def test_a_tie_counts_by_its_share() -> None:
    assert maj_at_k(["204", "7", "204", "7", "9"], [True, False, True, False, False]) == 0.5
    assert maj_at_k(["1", "2", "3"], [False, False, True]) == pytest.approx(1 / 3)


def test_no_answer_is_no_vote() -> None:
    assert maj_at_k([None, None, "204"], [False, False, True]) == 1.0
    assert maj_at_k([None, None], [False, False]) == 0.0
