"""Statistics of one model's scores, clustered by question: more samples of one say nothing about other questions.

Scores lie in [0, 1]: Q questions with k samples each; k may differ. With the mean m_q of a question's samples:

    mean = sum m_q / Q,    stderr^2 = sum (m_q - mean)^2 / (Q (Q - 1))

This standard error is clustered by question, whatever the number of samples. It splits into

    sampling^2 = sum_q s_q^2 / k_q / Q^2     s_q^2: unbiased variance of a question's samples; shrinks with k
    question^2 = stderr^2 - sampling^2       due to the choice of questions; more samples do not reduce it

Source: Miller, Adding Error Bars to Evals (arXiv 2411.00640).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, t

Samples = Sequence[Sequence[float]]
"""The scores of each question's samples."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its uncertainty."""

    mean: float
    stderr: float
    """NaN for one question"""
    low: float
    high: float
    """95% interval (or another), within [0, 1]"""
    stderr_question: float
    """Part of `stderr` that comes from the choice of questions"""
    stderr_sampling: float
    """Part of `stderr` that comes from sampling; NaN if a question has one sample only"""
    questions: int
    samples: int
    """Number of samples of all questions together"""


def estimate(scores: Samples, confidence: float = 0.95) -> Estimate:
    """Mean score and its clustered standard error, with Student's t for the interval.

    Where all questions have the mean 0, or all have 1, this formula gives no error; the interval is then the exact one
    of Clopper and Pearson for Q questions that all failed, or all passed.

    Raises:
        ValueError: no question, or one without samples
    """
    means = question_means(scores)
    Q, mean = len(means), float(means.mean())
    stderr = float(means.std(ddof=1) / math.sqrt(Q)) if Q > 1 else math.nan
    sampling = _sampling_error(scores)
    question = math.sqrt(max(stderr**2 - sampling**2, 0.0))
    if mean in (0.0, 1.0):
        edge = float(beta.ppf((1 + confidence) / 2, 1, Q))
        low, high = (0.0, edge) if mean == 0 else (1 - edge, 1.0)
    else:
        reach = float(t.ppf((1 + confidence) / 2, Q - 1)) * stderr if Q > 1 else math.inf
        low, high = max(mean - reach, 0.0), min(mean + reach, 1.0)
    return Estimate(mean, stderr, low, high, question, sampling, Q, sum(len(samples) for samples in scores))


def question_means(scores: Samples) -> NDArray[np.float64]:
    """Mean of each question, [Q]; raises ValueError without questions, or for a question without samples."""
    if not scores or not all(len(samples) for samples in scores):
        raise ValueError("there is no question, or one without samples, so there is no mean")
    return np.array([math.fsum(samples) / len(samples) for samples in scores])


def _sampling_error(scores: Samples) -> float:
    if min(len(samples) for samples in scores) < 2:
        return math.nan
    return math.sqrt(math.fsum(np.var(samples, ddof=1) / len(samples) for samples in scores)) / len(scores)


def macro_mean(values: Sequence[float], stderrs: Sequence[float]) -> tuple[float, float]:
    """Unweighted mean over benchmarks and its standard error, the benchmarks being independent."""
    k = len(values)
    return sum(values) / k, math.sqrt(sum(stderr**2 for stderr in stderrs)) / k
