"""The votes of a task's questions are compared side by side."""

from branchmerge.evaluation import math_worker
from branchmerge.evaluation.graders import WRONG_ANSWER, Verdict
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
