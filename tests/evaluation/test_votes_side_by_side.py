"""The votes of a task's questions are compared side by side, and none is waited for again and again."""

import pytest

from branchmerge.evaluation import math_worker
from branchmerge.evaluation.graders import WRONG_ANSWER, Verdict, votes
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


def test_an_answer_that_meets_the_deadline_is_not_compared_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    class Counting(math_worker.MathPool):
        def equal(self, gold: str, answer: str) -> bool | None:
            compared.append((gold, answer))
            return super().equal(gold, answer)

    pool = Counting(size=1, seconds=3)
    monkeypatch.setattr(math_worker, "_pool", lambda: pool)
    tower = "9^{9^{9^{9}}}"  # working it out never ends
    verdicts = [Verdict(False, WRONG_ANSWER, answer) for answer in ("1", "2", "3", tower, "1.0", tower)]
    assert votes(verdicts, "math") == ["1", "2", "3", tower, "1", tower]
    pool.close()
    assert [pair for pair in compared if tower in pair] == [("1", tower), (tower, "1.0")][:1]
