"""Compare the stored scores of two models question by question, benchmark by benchmark; see paired.py for the tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from branchmerge.evaluation.paired import (
    Difference,
    compare,
    detectable,
    holm,
    questions_needed,
    samples_needed,
    spread,
)
from branchmerge.evaluation.store import Score, samples_of

SAME = ("task_version", "docs_sha256", "sampling", "seed")
"""Keys of two scores that must be equal; docs_sha256 covers prompts, questions and references"""


@dataclass(frozen=True)
class Comparison:
    """Model minus `against`, on one task."""

    model: str
    against: str
    task: str
    difference: Difference
    p_holm: float
    """p, adjusted for the tasks that the two models are compared on"""
    detectable: float | None = None
    """Smallest true difference that is detected with a power of 80% at these numbers of questions and samples; None for
    one sample a question, which does not show it"""
    samples_needed: int | None = None
    """Samples of each model per question that make the difference `power=` detectable; None if no number does, or if it
    was not asked for"""
    questions_needed: int | None = None
    """Questions of this kind, with as many samples each as now, that make it detectable; None if not asked for"""


def comparisons(
    scores: Sequence[Score], against: str, root: Path, power: float | None = None
) -> tuple[list[Comparison], list[str]]:
    """Compare every model with one.

    Args:
        scores: of several models, and of `against` too
        root: the folder of the scores, with one folder per model
        power: a difference; reports how many samples or questions it takes to detect it

    Returns:
        The comparisons, and the reasons why others could not be made.
    """
    known = {(score.model, score.task): score for score in scores}
    found: list[Comparison] = []
    refused: list[str] = []
    for model in dict.fromkeys(score.model for score in scores if score.model != against):
        made: list[Comparison] = []
        for task in dict.fromkeys(score.task for score in scores):
            try:
                made.append(_compare(known[model, task], known[against, task], root, power))
            except (ValueError, KeyError) as error:
                refused.append(f"{model} and {against} on {task}: {error}")
        adjusted = holm({one.task: one.difference.p for one in made})
        found += [replace(one, p_holm=adjusted[one.task]) for one in made]
    return found, refused


def _compare(a: Score, b: Score, root: Path, power: float | None) -> Comparison:
    """One comparison, with p_holm as yet unadjusted; raises ValueError where the two are not comparable."""
    for name in SAME:
        if a.key.get(name) != b.key.get(name):
            raise ValueError(f"not comparable, their {name} differ: {a.key.get(name)} and {b.key.get(name)}")
    if a.missing or b.missing:
        raise ValueError(f"not comparable, {a.missing} and {b.missing} samples are missing")
    first, second = (samples(root / score.model, score) for score in (a, b))
    if first.keys() != second.keys():
        raise ValueError("not comparable, they answer other questions")
    pairs = list(first.values()), [second[question] for question in first]
    difference, questions, k = compare(*pairs), len(first), len(pairs[0][0])
    found = Comparison(a.model, b.model, a.task, difference, difference.p)
    if min(len(s) for s in (*pairs[0], *pairs[1])) < 2:
        return found
    known = spread(*pairs)
    found = replace(found, detectable=detectable(known, questions, k))
    if power is None:
        return found
    return replace(
        found,
        samples_needed=samples_needed(known, questions, power),
        questions_needed=questions_needed(known, k, power),
    )


def samples(folder: Path, score: Score) -> dict[str, list[float]]:
    """The accuracy of each stored sample, by question; raises ValueError if they are not stored."""
    rows = samples_of(folder, score)
    if rows is None:
        raise ValueError(f"not comparable, the samples of {score.model} are not stored")
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(str(row["id"]), []).append(float(row["accuracy"]))
    return found
