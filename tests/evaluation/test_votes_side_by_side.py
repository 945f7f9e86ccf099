"""The votes of a task's questions are compared side by side, and none is waited for again and again."""

from collections.abc import Iterator

import pytest

from branchmerge.evaluation import math_worker
from branchmerge.evaluation.graders import GRADER_TIMEOUT, WRONG_ANSWER, Verdict, votes
from branchmerge.evaluation.requests import Request, Response, Sampling
from branchmerge.evaluation.scoring import Graded, summarise
from branchmerge.machine import cores


def test_votes_of_several_questions_keep_all_cores_busy() -> None:
    """A worker takes a second to start, so that questions that are compared side by side get one each."""
    math_worker.end_workers()
    verdicts = [Verdict(False, WRONG_ANSWER, answer) for answer in (r"\frac{1}{2}", "0.5", "x")]
    graded = [
        Graded(Request("task", f"question {question}", number, (), Sampling(8), 0), Response("", 1, "stop"), verdict)
        for question in range(cores())
        for number, verdict in enumerate(verdicts)
    ]
    _, metrics = summarise(graded, "math")
    assert metrics["maj@3"] == 0
    assert len(math_worker._pool().workers()) == cores()


TOWER = "9^{9^{9^{9}}}"
"""Working it out never ends."""


class Counting(math_worker.MathPool):
    """Notes what is compared."""

    def __init__(self) -> None:
        super().__init__(size=1, seconds=3)
        self.compared: list[tuple[str, str]] = []

    def equal(self, gold: str, answer: str) -> bool | None:
        self.compared.append((gold, answer))
        return super().equal(gold, answer)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    counting = Counting()
    monkeypatch.setattr(math_worker, "_pool", lambda: counting)
    yield counting
    counting.close()


def wrong(*answers: str) -> list[Verdict]:
    return [Verdict(False, WRONG_ANSWER, answer) for answer in answers]


def test_an_answer_that_meets_the_deadline_is_not_compared_with_the_others(pool: Counting) -> None:
    assert votes(wrong("1", "2", "3", TOWER, "1.0", TOWER), "math") == ["1", "2", "3", TOWER, "1", TOWER]
    assert [pair for pair in pool.compared if TOWER in pair] == [("1", TOWER)]


def test_nor_are_the_others_compared_with_it(pool: Counting) -> None:
    """Each would meet the deadline too, and would then not be found equal to those that it equals."""
    assert votes(wrong("3", TOWER, "1/2", "0.5"), "math") == ["3", TOWER, "1/2", "1/2"]
    late = Verdict(False, GRADER_TIMEOUT, TOWER)  # it met the deadline when it was graded
    assert votes([late, *wrong("1/2", "0.5")], "math") == [TOWER, "1/2", "1/2"]
    assert [pair for pair in pool.compared if TOWER in pair] == [("3", TOWER)]


def test_no_sample_is_no_score() -> None:
    with pytest.raises(ValueError, match="no question"):
        summarise([], "math")
