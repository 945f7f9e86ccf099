"""Shared by all tasks: hand a response to the graders and report what lm-eval averages."""

from typing import Any

from branchmerge.evaluation.graders import NO_ANSWER, grade
from branchmerge.trajectories.schema import Reference


def grade_response(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Metrics of one question: accuracy, and whether there was no answer to grade (both shares)."""
    verdict = grade(results[0], Reference.parse(doc["reference"]))
    return {"accuracy": float(verdict.correct), "no_answer": float(verdict.reason == NO_ANSWER)}
