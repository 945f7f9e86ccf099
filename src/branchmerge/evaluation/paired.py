"""Two models on the same questions: is one better, by how much, and how large a difference could have been seen.

All statistics are of the Q numbers d_q, the differences of the two models' means on question q: what makes a question
hard for both cancels. The variance of their mean is

    Var = (omega^2 + sigma_a^2 / k + sigma_b^2 / k) / Q

omega^2: variance of the true differences between questions; sigma^2: mean variance of a question's samples, k of each
model. Source: Miller, Adding Error Bars to Evals (arXiv 2411.00640).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from branchmerge.evaluation.stats import Samples, question_means

RESAMPLES = 20_000
EXACT = 16
"""Up to this many questions that differ, the sign-flip test enumerates all flips."""


@dataclass(frozen=True)
class Difference:
    """Model a minus model b."""

    mean: float
    stderr: float
    """Standard error over the questions, paired"""
    low: float
    high: float
    """Interval by the bootstrap over questions"""
    p: float
    """p-value of the two-sided sign-flip test"""
    questions: int


def compare(a: Samples, b: Samples, confidence: float = 0.95, seed: int = 42) -> Difference:
    """Compare two models' samples of the same questions, in the same order.

    The interval is the percentile bootstrap of whole questions. The p-value is the share of all ways to swap the two
    models' names question by question that give a difference at least as large: exact for few questions, else from
    random swaps, among which the observed one is counted.

    Raises:
        ValueError: other numbers of questions, or fewer than two
    """
    d = _differences(a, b)
    Q, mean = len(d), float(d.mean())
    draw = np.random.default_rng(seed)
    means = np.concatenate([d[draw.integers(Q, size=(500, Q))].mean(axis=1) for _ in range(RESAMPLES // 500)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail]).tolist()
    return Difference(mean, float(d.std(ddof=1) / math.sqrt(Q)), low, high, _sign_flip_p(d, draw), Q)


def _differences(a: Samples, b: Samples) -> NDArray[np.float64]:
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"{len(a)} and {len(b)} questions: a comparison needs the same ones, two or more")
    return question_means(a) - question_means(b)


def _sign_flip_p(d: NDArray[np.float64], draw: np.random.Generator) -> float:
    """Share of the 2^Q sums of +d_q or -d_q that are at least as far from zero as the sum of d; zeros change
    nothing."""
    d = d[d != 0]
    n, reached = len(d), abs(d.sum()) - 1e-12 * abs(d).sum()  # equal sums, zero among them, may differ in rounding
    if n <= EXACT:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
        return float((abs(signs @ d) >= reached).mean())
    hits = 1
    for _ in range(RESAMPLES // 500):
        signs = draw.choice((1.0, -1.0), size=(500, n))
        hits += int((abs(signs @ d) >= reached).sum())
    return hits / (RESAMPLES + 1)


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for multiple tests by Holm's step-down rule, in the given order."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(ps, key=lambda name: ps[name])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in ps}


@dataclass(frozen=True)
class Spread:
    """What the precision of a comparison depends on, besides the numbers of questions and samples."""

    omega: float
    """Standard deviation of the true differences between questions"""
    sigma_a: float
    sigma_b: float
    """Standard deviation of a question's samples (root mean square over questions)"""

    def stderr(self, questions: int, samples: int) -> float:
        """Standard error of the difference, for these numbers of questions, and of samples of each model per
        question."""
        return math.sqrt((self.omega**2 + (self.sigma_a**2 + self.sigma_b**2) / samples) / questions)


def spread(a: Samples, b: Samples) -> Spread:
    """Estimate the spread from two or more samples of each model on each question.

    Raises:
        ValueError: a question with one sample, other numbers of questions, or fewer than two
    """
    d = _differences(a, b)
    if min(len(samples) for samples in (*a, *b)) < 2:
        raise ValueError("a question with one sample does not tell how much samples vary; take two or more")
    within = [[float(np.var(samples, ddof=1)) for samples in model] for model in (a, b)]
    of_means = [v / len(s) for v, s in zip(within[0] + within[1], [*a, *b], strict=True)]
    omega = math.sqrt(max(float(d.var(ddof=1)) - math.fsum(of_means) / len(d), 0.0))
    sigma_a, sigma_b = (math.sqrt(math.fsum(model) / len(model)) for model in within)
    return Spread(omega, sigma_a, sigma_b)


def detectable(known: Spread, questions: int, samples: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true difference that a two-sided test detects with the given power (normal approximation)."""
    return _reach(power, alpha) * known.stderr(questions, samples)


def samples_needed(
    known: Spread, questions: int, difference: float, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Samples of each model per question that make a difference detectable; None if no number does."""
    left = questions * (difference / _reach(power, alpha)) ** 2 - known.omega**2
    if left <= 0:
        return None
    return max(1, math.ceil((known.sigma_a**2 + known.sigma_b**2) / left - 1e-9))


def questions_needed(known: Spread, samples: int, difference: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Number of questions of this kind that makes a difference detectable, with this many samples each; two or more, as
    in `compare`."""
    return max(2, math.ceil((_reach(power, alpha) * known.stderr(1, samples) / difference) ** 2 - 1e-9))


def _reach(power: float, alpha: float) -> float:
    return float(norm.ppf(1 - alpha / 2) + norm.ppf(power))
