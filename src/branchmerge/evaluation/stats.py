"""Statistics of scores."""

import math
from collections.abc import Sequence


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values and its standard error (sample standard deviation / sqrt(n)); NaN for one value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def macro_mean(values: Sequence[float], stderrs: Sequence[float]) -> tuple[float, float]:
    """Unweighted mean over benchmarks and its standard error, the benchmarks being independent."""
    k = len(values)
    return sum(values) / k, math.sqrt(sum(stderr**2 for stderr in stderrs)) / k
