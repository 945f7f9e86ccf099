"""TIES: trim each task vector to its largest entries, elect a sign per coordinate, average the entries that have it.

    d_i = W_i - W_0 where |W_i - W_0| is among the density * N largest of N, else 0
    s = sign(sum_i w_i d_i)
    W = W_0 + lam sum_{i: sign(w_i d_i) = s} w_i d_i / sum_{i: sign(w_i d_i) = s} w_i

N is the size of a tensor, as in mergekit: each one keeps its own largest. The paper's authors rank the entries of all
tensors together, so that a tensor that changed little keeps fewer.

Source: Yadav et al., TIES-Merging: Resolving interference when merging models (arXiv 2306.01708).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from branchmerge.merge.operators.largest import Largest, largest
from branchmerge.merge.operators.limits import fractions
from branchmerge.merge.operators.task_vectors import TaskVectorOperator, Thin, backbone, magnitude, magnitudes
from branchmerge.merge.operators.weights import weights_for


@dataclass(frozen=True)
class Ties(TaskVectorOperator):
    """Any number of models and their backbone -> backbone + the mean of what agrees in sign."""

    normalize: bool = True
    """Divide by the sum of the weights that agree: a mean, as in the paper; false: a sum."""
    density: tuple[float, ...] = (0.2,)
    """Fraction of entries of each task vector that is kept, the largest ones; one number for all models or one each."""

    consensus: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "density", fractions("density", self.density))

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> list[Largest]:
        origin = backbone(base)
        densities = weights_for(self.density, len(models), name="densities")
        return [
            largest(magnitudes(model, origin), int(density * origin.numel()))[0]
            for model, density in zip(models, densities, strict=True)
        ]

    def thin(self, measured: Any, models: Sequence[Tensor]) -> Thin:
        takers = [found.taker() for found in measured]
        return lambda vectors: [
            torch.where(take(magnitude(vector)), vector, 0.0) for take, vector in zip(takers, vectors, strict=True)
        ]
