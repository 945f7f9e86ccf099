"""The quartiles of the scores S, and the threshold T that Arcee Fusion takes from them: exact order statistics.

The quantile q of n values is element floor(q (n - 1)) of them sorted; nothing is sampled.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from branchmerge.merge import selection_kernels as kernels
from branchmerge.merge.arrays import Array


def quartiles(S: Array) -> tuple[float, float, float]:
    """Q1, median and Q3 by partial sorting; infinite for no values."""
    if not S.size:
        return math.inf, math.inf, math.inf
    places = quartile_places(S.size)
    q1, median, q3 = np.partition(S, places, axis=None)[places].tolist()
    return q1, median, q3


def quartile_places(n: int) -> list[int]:
    """Where the quartiles stand among n sorted values."""
    return [math.floor(q * (n - 1)) for q in (0.25, 0.5, 0.75)]


def sum_of_counts(counts: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """The sum of the parts' counts, in 64 bits: each part's fit into 32, their sum may not."""
    return np.sum(counts, axis=0, dtype=np.int64)


def quartiles_by_histogram(
    counts: NDArray[np.int64], n: int, gather: Callable[[NDArray[np.uint32], int], Array]
) -> tuple[float, float, float]:
    """The same quartiles, without sorting all values: only the buckets that hold a quartile are gathered and sorted.

    Args:
        counts: histogram over the leading bits of S, [KEYS]
        gather: given up to three of its keys and how many values they have, returns these values
    """
    places = quartile_places(n)
    located = kernels.locate(counts, np.array(places)).tolist()
    # Elements that are equal in both models have S = 0; they may be most of the tensor and need no sorting.
    size_of = {key: size for key, _, size in located if key != kernels.ZERO}
    if not size_of:
        return 0.0, 0.0, 0.0
    values = gather(np.resize(list(size_of), 3).astype(np.uint32), sum(size_of.values()))
    start_of = dict(zip(size_of, accumulate(size_of.values(), initial=0), strict=False))
    # Each quartile's place among the gathered values; None where it is zero.
    among = [
        start_of[key] + place - first if key in size_of else None
        for place, (key, first, _) in zip(places, located, strict=True)
    ]
    values.partition([place for place in among if place is not None])
    q1, median, q3 = (0.0 if place is None else float(values[place]) for place in among)
    return q1, median, q3


def threshold(quartiles: tuple[float, float, float], lam: float) -> float:
    """T = median + lam * (Q3 - Q1)."""
    if math.isinf(lam):
        return lam
    q1, median, q3 = quartiles
    return median + lam * (q3 - q1)
