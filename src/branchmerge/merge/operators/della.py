"""DELLA: drop entries of each task vector at random, small ones rather than large ones, rescale, agree on signs.

In each row of C entries, the one of rank r (0 the smallest magnitude) is kept with probability

    p = density - epsilon + 2 epsilon r / (C - 1)
    d_i = m (W_i - W_0) / p,   m = 1 with probability p, else 0
    s = sign(sum_i w_i d_i)
    W = W_0 + lam sum_{i: sign(w_i d_i) = s} w_i d_i / sum_{i: sign(w_i d_i) = s} w_i

Without `rescale`, a tensor of up to a million elements is merged as the first one of a mergekit run with the same seed;
for later tensors mergekit continues its random stream. Its `rescale` multiplies each tensor's d_i by
|W_i - W_0|_1 / |m (W_i - W_0)|_1 in place of the paper's 1 / p, so that its expectation is not W_i - W_0.

Source: Deep et al., DELLA-Merging: Reducing interference in model merging through magnitude-based sampling
(arXiv 2406.11617).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from branchmerge.merge.arrays import row_length
from branchmerge.merge.operators.dare_linear import bernoulli
from branchmerge.merge.operators.limits import fractions, number, switch, whole
from branchmerge.merge.operators.task_vectors import TaskVectorOperator, Thin, magnitude
from branchmerge.merge.operators.weights import weights_for


@dataclass(frozen=True)
class Della(TaskVectorOperator):
    """Any number of models and their backbone -> backbone + what was kept and agrees in sign."""

    normalize: bool = True
    """Divide by the sum of the weights that agree: a mean; false: a sum."""
    density: tuple[float, ...] = (0.5,)
    """Mean probability that an entry of a row is kept; one number for all models or one each."""
    epsilon: float = 0.1
    """The largest entry of a row is kept with density + epsilon, the smallest with density - epsilon."""
    rescale: bool = True
    """Divide kept entries by their probability, which preserves the expectation."""
    seed: int = 42
    """Seed of the draw, which does not depend on the number of threads."""

    consensus: ClassVar[bool] = True
    late = frozenset({"weights", "lam", "normalize", "density", "epsilon", "rescale", "seed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "density", fractions("density", self.density))
        object.__setattr__(self, "epsilon", number("epsilon", self.epsilon, 0, 1))
        for density in self.density:
            if not (self.epsilon < density <= 1 - self.epsilon or self.epsilon == 0):
                raise ValueError(f"density {density} +- epsilon {self.epsilon} must stay within 0 and 1")
        switch("rescale", self.rescale)
        whole("seed", self.seed, 0)

    def thin(self, measured: Any, models: Sequence[Tensor]) -> Thin:
        densities = weights_for(self.density, len(models), name="densities")
        draw = torch.Generator().manual_seed(self.seed)
        columns = row_length(models[0])

        def kept(vectors: list[Tensor]) -> list[Tensor]:
            thinned = []
            for vector, density in zip(vectors, densities, strict=True):
                p = probabilities(magnitude(vector).reshape(-1, columns), density, self.epsilon).reshape(-1)
                keep = bernoulli(p.cpu(), draw).to(vector.device)
                thinned.append(torch.where(keep, vector / p.double() if self.rescale else vector, 0.0))
            return thinned

        return kept


def probabilities(sizes: Tensor, density: float, epsilon: float) -> Tensor:
    """Probability that each entry is kept, by its rank in its row; equal magnitudes are ranked by their position.

    Args:
        sizes: magnitudes, [R, C]
        density: mean probability
        epsilon: half the range of the probabilities

    Returns:
        float32 [R, C]; `density` if rows have one entry
    """
    columns = sizes.shape[1]
    if columns == 1:
        return torch.full_like(sizes, density)
    order = sizes.argsort(dim=1, stable=True)  # sorting takes most of the time, so ranks are not found by a second one
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(columns, device=order.device).expand_as(order))
    return density - epsilon + 2 * epsilon * ranks.float() / (columns - 1)
