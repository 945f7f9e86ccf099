"""SCE: select the coordinates where the models differ most, calculate a weight for each, erase minority signs.

    d_i = W_i - W_0 where the variance of the n task vectors is among the select_topk * N largest, else 0;
                                                              N: number of coordinates with a variance above zero
    w_i = sum d_i^2 / sum_j sum d_j^2                         one weight per tensor
    s = sign(sum_i d_i)                                       plus where the sum is zero
    W = W_0 + sum_{i: sign(d_i) = s} w_i d_i / sum_{i: sign(d_i) = s} w_i

Source: Wan et al., FuseChat: Knowledge fusion of chat models (arXiv 2408.07990).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import blocks, summed
from branchmerge.merge.operators.largest import Largest, largest
from branchmerge.merge.operators.limits import number
from branchmerge.merge.operators.task_vectors import Thin, backbone, combined


@dataclass(frozen=True)
class Sce(Operator):
    """Any number of models and their backbone -> backbone + the mean of the selected entries that agree in sign."""

    select_topk: float = 1.0
    """Fraction of the coordinates in which the models differ that is kept, the largest variances; 1 for all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "select_topk", number("select_topk", self.select_topk, 0, 1))

    def needs_base(self) -> bool:
        return True

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> tuple[Largest, list[float]]:
        """Which coordinates are selected, and the weights."""
        origin = backbone(base)
        selected = Largest(float("-inf"), 0)
        if self.select_topk < 1:
            variances = np.empty(origin.numel(), dtype=np.float32)
            for place, (zero, *parts) in blocks([origin, *models]):
                variances[place] = variance([part - zero for part in parts]).cpu().numpy()
            (selected,) = largest(variances, int(self.select_topk * np.count_nonzero(variances)))
        thin = selecting(selected)
        energy = [0.0] * len(models)
        for _, (zero, *parts) in blocks([origin, *models]):
            vectors = thin([part - zero for part in parts])
            energy = [e + summed(vector.square()) for e, vector in zip(energy, vectors, strict=True)]
        total = sum(energy)
        return selected, [e / total if total else 1 / len(models) for e in energy]

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        selected, weights = measured
        votes = [1.0] * len(models)
        return combined(models, backbone(base), selecting(selected), weights, 1.0, normalize=True, votes=votes)

    def facts(self, measured: Any) -> dict[str, float]:
        return {f"weight_{i}": weight for i, weight in enumerate(measured[1])}


def variance(vectors: Sequence[Tensor]) -> Tensor:
    """Variance of each coordinate between the models, in the precision in which it is ranked: float32 [B]."""
    stacked = torch.stack(list(vectors))
    # Equal values have variance zero, though their mean may be rounded to another number.
    return torch.where(stacked.amin(0) < stacked.amax(0), stacked.var(0, correction=0), 0.0).float()


def selecting(selected: Largest) -> Thin:
    """Set coordinates to zero in all task vectors unless their variance is among the largest."""
    if selected.value == float("-inf"):  # all of them: no variance is needed, which takes most of the time
        return lambda vectors: vectors
    take = selected.taker()

    def thin(vectors: list[Tensor]) -> list[Tensor]:
        keep = take(variance(vectors))
        return [torch.where(keep, vector, 0.0) for vector in vectors]

    return thin
