"""DARE with task arithmetic: drop entries of each task vector at random, and rescale what is kept.

    d_i = m (W_i - W_0) / density,   m = 1 with probability `density`, else 0
    W = W_0 + lam sum_i w_i d_i

Without `rescale`, a tensor of up to a million elements is merged as the first one of a mergekit run with the same seed;
for later tensors mergekit continues its random stream. Its `rescale` multiplies each tensor's d_i by
|W_i - W_0|_1 / |m (W_i - W_0)|_1 in place of the paper's 1 / density, which is close to it for large tensors.

Source: Yu et al., Language models are super Mario: Absorbing abilities from homologous models as a free lunch
(arXiv 2311.03099).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchmerge.merge.operators.limits import fractions, switch, whole
from branchmerge.merge.operators.task_vectors import TaskVectorOperator, Thin
from branchmerge.merge.operators.weights import weights_for


@dataclass(frozen=True)
class DareLinear(TaskVectorOperator):
    """Any number of models and their backbone -> backbone + the sum of the thinned task vectors."""

    density: tuple[float, ...] = (0.5,)
    """Probability that an entry is kept; one number for all models or one each."""
    rescale: bool = True
    """Divide kept entries by `density`, which preserves the expectation."""
    seed: int = 42
    """Seed of the draw, which does not depend on the number of threads."""

    late = frozenset({"weights", "lam", "normalize", "density", "rescale", "seed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "density", fractions("density", self.density))
        switch("rescale", self.rescale)
        whole("seed", self.seed, 0)

    def thin(self, measured: Any, models: Sequence[Tensor]) -> Thin:
        densities = weights_for(self.density, len(models), name="densities")
        draw = torch.Generator().manual_seed(self.seed)

        def kept(vectors: list[Tensor]) -> list[Tensor]:
            thinned = []
            for vector, density in zip(vectors, densities, strict=True):
                keep = bernoulli(torch.full((vector.numel(),), density), draw).to(vector.device)
                scale = density if self.rescale and density else 1.0
                thinned.append(torch.where(keep, vector / scale, 0.0))
            return thinned

        return kept


def bernoulli(p: Tensor, draw: torch.Generator) -> Tensor:
    """True with probability p: float32 [B] -> bool [B], on the CPU, the same with any number of threads."""
    return torch.bernoulli(p, generator=draw).bool()
