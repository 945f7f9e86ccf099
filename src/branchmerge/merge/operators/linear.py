"""Linear average ("model soup"): sum of w_i W_i, with the weights made to sum to one.

Source: Wortsman et al., Model soups (arXiv 2203.05482).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Any number of models -> their weighted mean."""

    weights: tuple[float, ...] | None = None
    """One weight a model, in the order of the tree; null for equal ones."""

    n_way: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
            if not sum(self.weights):
                raise ValueError("weights sum to zero, so their mean is undefined")

    def __call__(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        weights = self.weights or (1.0,) * len(models)
        if len(weights) != len(models):
            raise ValueError(f"{len(weights)} weights for {len(models)} models")
        total = torch.zeros(models[0].shape, dtype=torch.float64, device=models[0].device)
        for weight, model in zip(weights, models, strict=True):
            total += weight * model.double()
        return (total / sum(weights)).float()
