"""DARE with sign consensus: drop entries of each task vector at random, rescale, sum the entries that agree in sign.

    d_i = m (W_i - W_0) / density,   m = 1 with probability `density`, else 0
    s = sign(sum_i w_i d_i)
    W = W_0 + lam sum_{i: sign(w_i d_i) = s} w_i d_i

Source: Yu et al. (arXiv 2311.03099), with the election of TIES (arXiv 2306.01708).
"""

from dataclasses import dataclass
from typing import ClassVar

from branchmerge.merge.operators.dare_linear import DareLinear


@dataclass(frozen=True)
class DareTies(DareLinear):
    """Any number of models and their backbone -> backbone + the sum of what was kept and agrees in sign."""

    consensus: ClassVar[bool] = True
