"""Shared by all tasks: hand responses to the graders and report what lm-eval averages over the questions."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from branchmerge.evaluation.graders import NO_ANSWER, RUNS_CODE, SECONDARY, Verdict, grade, votes
from branchmerge.evaluation.metrics import avg_at_k, maj_at_k, pass_at_k
from branchmerge.machine import cores
from branchmerge.trajectories.schema import Reference

WITHOUT_VOTES = (*RUNS_CODE, "")
"""Graders whose answers are programs, or that tell no answer: there is no majority."""


def grade_response(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Metrics of one question with one response: accuracy, and whether there was no answer to grade (both shares)."""
    verdict = grade(results[0], Reference.parse(doc["reference"]))
    return {"accuracy": float(verdict.correct), "no_answer": float(verdict.reason == NO_ANSWER)}


def grade_responses(doc: dict[str, Any], results: Sequence[str] | Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of one question with k responses, all shares.

    accuracy (avg@k, which is pass@1), no_answer, truncated (reasoning never closed, which is no answer either), the
    grader's second opinions; for k > 1 also maj@k, unless the answers are programs, and pass@2, pass@4, ..., pass@k.

    Args:
        doc: a document of the task
        results: what lm-eval hands over: the k responses, or a list that holds nothing but the list of them

    Raises:
        ValueError: no response
    """
    responses = [text for given in results for text in ([given] if isinstance(given, str) else given)]
    if not responses:
        raise ValueError(f"the question {doc['id']} has no response")
    reference = Reference.parse(doc["reference"])
    with ThreadPoolExecutor(max_workers=min(len(responses), cores())) as pool:
        verdicts = list(pool.map(lambda response: grade(response, reference), responses))
    return metrics(verdicts, reference.grader)


def metrics(verdicts: Sequence[Verdict], grader: str) -> dict[str, float]:
    """What `grade_responses` returns, from the verdicts on one question's responses."""
    k = len(verdicts)
    correct = [verdict.correct for verdict in verdicts]
    found = {
        "accuracy": avg_at_k(correct),
        "no_answer": avg_at_k([verdict.reason == NO_ANSWER for verdict in verdicts]),
        "truncated": avg_at_k([verdict.truncated for verdict in verdicts]),
    }
    for name in SECONDARY.get(grader, ()):
        found[name] = avg_at_k([verdict.secondary[name] for verdict in verdicts])
    if k > 1:
        found |= {f"pass@{n}": pass_at_k(correct, n) for n in sorted({k, *(1 << i for i in range(1, k.bit_length()))})}
        if grader not in WITHOUT_VOTES:
            found[f"maj@{k}"] = maj_at_k(votes(verdicts, grader), correct)
    return found
