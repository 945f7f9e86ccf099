"""Model Breadcrumbs: task arithmetic on task vectors without their largest and their smallest entries.

    d_i = W_i - W_0 where the rank of |W_i - W_0| is above gamma * N and up to (gamma + density) * N of N, else 0
    W = W_0 + lam sum_i w_i d_i

Where gamma + density is above 1, fewer of the largest are left out, so that `density` of all are kept.

Source: Davari, Belilovsky, Model Breadcrumbs: Scaling multi-task model merging with sparse masks (arXiv 2312.06795).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchmerge.merge.operators.largest import Largest, largest
from branchmerge.merge.operators.limits import fractions
from branchmerge.merge.operators.task_vectors import TaskVectorOperator, Thin, backbone, magnitude, magnitudes
from branchmerge.merge.operators.weights import weights_for


@dataclass(frozen=True)
class Breadcrumbs(TaskVectorOperator):
    """Any number of models and their backbone -> backbone + the sum of what is neither large nor small."""

    density: tuple[float, ...] = (0.9,)
    """Fraction of each task vector that is kept; one number for all models or one each."""
    gamma: tuple[float, ...] = (0.01,)
    """Fraction of each task vector that is left out as too large; one number for all models or one each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "density", fractions("density", self.density))
        object.__setattr__(self, "gamma", fractions("gamma", self.gamma))

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> list[list[Largest]]:
        origin = backbone(base)
        n = origin.numel()
        densities = weights_for(self.density, len(models), name="densities")
        gammas = weights_for(self.gamma, len(models), name="gammas")
        found = []
        for model, density, gamma in zip(models, densities, gammas, strict=True):
            kept = int(density * n)
            outliers = min(int(gamma * n), n - kept)
            found.append(largest(magnitudes(model, origin), outliers, outliers + kept))
        return found

    def thin(self, measured: Any, models: Sequence[Tensor]) -> Thin:
        takers = [(outliers.taker(), upper.taker()) for outliers, upper in measured]

        def kept(vectors: list[Tensor]) -> list[Tensor]:
            thinned = []
            for (outliers, upper), vector in zip(takers, vectors, strict=True):
                size = magnitude(vector)
                thinned.append(torch.where(upper(size) & ~outliers(size), vector, 0.0))
            return thinned

        return kept
