"""Metrics of one question's samples; a benchmark's is their mean over the questions."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def avg_at_k(correct: Sequence[float]) -> float:
    """Mean over the samples, which is also pass@1."""
    return math.fsum(correct) / len(correct)


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Probability that one of k samples is right, unbiased: 1 - C(n - c, k) / C(n, k) with c of n right.

    Source: Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374).

    Raises:
        ValueError: fewer than k samples
    """
    n, c = len(correct), sum(map(bool, correct))
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs {k} samples of each question, there are {n}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer is right; among equally frequent ones, the share that is right.

    Args:
        answers: what each sample answers, in a form in which equal answers are equal; None for none, which is no vote
        correct: of each sample; the same for equal answers
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {answer for answer, n in votes.items() if n == most}
    right = {answer for answer, yes in zip(answers, correct, strict=True) if yes and answer in winners}
    return len(right) / len(winners)
