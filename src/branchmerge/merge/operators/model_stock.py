"""Model Stock: the mean of the models, moved towards the backbone the less their task vectors agree.

    t = n cos(theta) / (1 + (n - 1) cos(theta))       cos(theta): mean pairwise cosine of the n task vectors
    W = t mean(W_i) + (1 - t) W_0

Source: Jang et al., Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import combination, gram
from branchmerge.merge.operators.task_vectors import backbone


@dataclass(frozen=True)
class ModelStock(Operator):
    """Any number of models and their backbone -> a point between their mean and the backbone. No parameters."""

    def needs_base(self) -> bool:
        return True

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> float:
        return ratio(gram(models, backbone(base)))

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        n = len(models)
        return combination([1 - measured, *[measured / n] * n], [backbone(base), *models])

    def facts(self, measured: Any) -> dict[str, float]:
        return {"t": measured}


def ratio(G: Tensor) -> float:
    """t for task vectors with the Gram matrix G, float64 [n, n]; 1 for a single one, 0 where they cancel."""
    n = len(G)
    if n == 1:
        return 1.0
    norms = G.diagonal().sqrt()
    cosines = torch.where(torch.outer(norms, norms) > 0, G / torch.outer(norms, norms), 0.0)
    cosine = float((cosines.sum() - cosines.trace()) / (n * (n - 1)))
    # Zero where the directions sum to zero, and the mean of the models with them.
    agreement = 1 + (n - 1) * cosine
    return n * cosine / agreement if agreement > 1e-9 else 0.0
