"""Task arithmetic: the backbone plus the weighted sum of the task vectors W_i - W_0.

Source: Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class TaskArithmetic:
    """Any number of models and their backbone -> backbone + weight * sum of the task vectors."""

    weight: float = 1.0
    """Factor of every task vector."""

    n_way: ClassVar[bool] = True
    needs_base: ClassVar[bool] = True

    def __call__(self, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        if base is None:
            raise ValueError("task arithmetic needs the backbone's tensor")
        origin = base.double()
        total = origin.clone()
        for model in models:
            total += self.weight * (model.double() - origin)
        return total.float()
