"""From graded samples to a score: means over questions, clustered standard errors, and further metrics."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from branchmerge.evaluation.graders import NO_ANSWER, Verdict
from branchmerge.evaluation.metrics import avg_at_k
from branchmerge.evaluation.requests import Request, Response
from branchmerge.evaluation.stats import Estimate, estimate
from branchmerge.evaluation.tasks.grading import metrics
from branchmerge.machine import cores


@dataclass(frozen=True)
class Graded:
    """One sample and its verdict."""

    request: Request
    response: Response
    verdict: Verdict

    @property
    def truncated(self) -> bool:
        """Whether it was cut off, or its reasoning never ended."""
        return self.response.finish == "length" or self.verdict.truncated

    def row(self) -> dict[str, Any]:
        """The sample as a row of samples/<task>.jsonl."""
        return {
            "id": self.request.question,
            "sample": self.request.sample,
            "seed": self.request.seed,
            "messages": [turn.as_dict() for turn in self.request.messages],
            "response": self.response.text,
            "answer": self.verdict.answer,
            "accuracy": float(self.verdict.correct),
            "no_answer": float(self.verdict.reason == NO_ANSWER),
            "truncated": float(self.truncated),
            "reason": self.verdict.reason,
            "finish": self.response.finish,
            "output_tokens": self.response.tokens,
            **self.verdict.secondary,
        }


def summarise(graded: Sequence[Graded], grader: str) -> tuple[Estimate, dict[str, float]]:
    """Average over the samples of a question, then over questions. Where samples are missing, metrics of k samples are
    computed for the k that every question has.

    Args:
        grader: of the task's questions, which decides what else is reported; empty for lm-eval's own

    Returns:
        Accuracy, and the other metrics by name: means of the questions' means.

    Raises:
        ValueError: there is no sample
    """
    questions: dict[str, list[Graded]] = {}
    for one in graded:
        questions.setdefault(one.request.question, []).append(one)
    scores = [[float(one.verdict.correct) for one in samples] for samples in questions.values()]
    accuracy = estimate(scores)
    # Votes compare a question's answers pair by pair, in processes of math-verify: one thread would keep one core busy.
    with ThreadPoolExecutor(cores(), "votes") as pool:
        told = list(pool.map(lambda samples: _of_question(samples, grader), questions.values()))
    names = [name for name in told[0] if name != "accuracy" and all(name in one for one in told)]
    return accuracy, {name: avg_at_k([one[name] for one in told]) for name in names}


def _of_question(samples: Sequence[Graded], grader: str) -> dict[str, float]:
    found = metrics([one.verdict for one in samples], grader)
    found["truncated"] = avg_at_k([one.truncated for one in samples])
    found["output_tokens"] = avg_at_k([one.response.tokens for one in samples])
    return found
