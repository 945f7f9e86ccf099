"""Common base of the operators on task vectors W_i - W_0: thin each, elect signs, sum, block by block.

    W = W_0 + lam sum_i w_i d_i [/ sum_i w_i],    d_i the thinned task vector of model i

With sign consensus, the sign of a coordinate is that of sum_i w_i d_i (plus where the sum is zero); entries with the
other sign are left out of the sum and of the divisor.

Shapes: B, the elements of a block.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from branchmerge.merge.arrays import row_length
from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.blocks import blocks, room_for
from branchmerge.merge.operators.limits import number, switch
from branchmerge.merge.operators.weights import as_weights, weights_for

CANCELS = 1e-8
"""A sum of weights below this share of their absolute sum counts as zero."""
Thin = Callable[[list[Tensor]], list[Tensor]]
"""Thins the blocks of all task vectors, float64 [B] each: sets the entries that are left out to zero."""


def backbone(base: Tensor | None) -> Tensor:
    """The backbone's tensor; raises ValueError if it is not given."""
    if base is None:
        raise ValueError("this operator needs the backbone's tensor")
    return base


@dataclass(frozen=True)
class TaskVectorOperator(Operator):
    """Any number of models and their backbone -> backbone + lam times the sum of the thinned task vectors."""

    weights: tuple[float, ...] | None = None
    """Factor of each task vector, in the order of the tree; one number for all of them, null for 1."""
    lam: float = 1.0
    """Factor of their sum."""
    normalize: bool = False
    """Divide the sum by the sum of the weights."""

    consensus: ClassVar[bool] = False
    """Leave out entries whose sign differs from that of the sum."""
    late = frozenset({"weights", "lam", "normalize"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", as_weights(self.weights))
        object.__setattr__(self, "lam", number("lam", self.lam))
        switch("normalize", self.normalize)
        if self.normalize and not self.consensus and self.weights is not None and not sum(self.weights):
            raise ValueError(f"weights {self.weights} sum to zero, so they cannot be made to sum to one")

    def needs_base(self) -> bool:
        return True

    @abstractmethod
    def thin(self, measured: Any, models: Sequence[Tensor]) -> Thin:
        """A function to be called with the blocks of the task vectors, in order."""

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        w = weights_for(self.weights, len(models))
        thin = self.thin(measured, models)
        votes = w if self.consensus else None
        return combined(models, backbone(base), thin, w, self.lam, normalize=self.normalize, votes=votes)


def combined(
    models: Sequence[Tensor],
    base: Tensor,
    thin: Thin,
    weights: Sequence[float],
    lam: float,
    *,
    normalize: bool,
    votes: Sequence[float] | None,
) -> Tensor:
    """The backbone plus lam times `summed` of the thinned task vectors; dtype as in `Operator.__call__`."""
    out = room_for([base, *models])
    for place, (origin, *parts) in blocks([base, *models], row_length(base)):
        vectors = thin([part - origin for part in parts])
        out[place] = origin + lam * summed(vectors, weights, normalize=normalize, votes=votes)
    return out.reshape(base.shape)


def summed(
    vectors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool, votes: Sequence[float] | None
) -> Tensor:
    """Weighted sum of task vectors.

    Args:
        vectors: float64 [B], one a model
        weights: one a model
        normalize: divide by the sum of the weights of the entries that were added
        votes: weight of each model in the election of signs; None: no election, all entries are added

    Returns:
        float64 [B]
    """
    weighted = [w * d for w, d in zip(weights, vectors, strict=True)]
    if votes is None:
        total = torch.stack(weighted).sum(0)
        return total / sum(weights) if normalize else total
    positive = torch.stack([vote * d for vote, d in zip(votes, vectors, strict=True)]).sum(0) >= 0
    agreeing = torch.stack([torch.where(positive, v > 0, v < 0) for v in weighted])
    total = (torch.stack(weighted) * agreeing).sum(0)
    if not normalize:
        return total
    shares = torch.tensor(weights, dtype=total.dtype, device=total.device)[:, None] * agreeing
    share = shares.sum(0)
    # Weights of both signs may cancel to a rounding error, which must not be a divisor; small weights may be one.
    return total / torch.where(share.abs() > CANCELS * shares.abs().sum(0), share, 1.0)


def magnitudes(model: Tensor, base: Tensor) -> NDArray[np.float32]:
    """|W - W_0| of every element, in a float32 array of its own."""
    out = np.empty(base.numel(), dtype=np.float32)
    for place, (part, origin) in blocks([model, base]):
        out[place] = magnitude(part - origin).cpu().numpy()
    return out


def magnitude(vector: Tensor) -> Tensor:
    """|d| in the precision in which it is ranked, float32 [B]."""
    return vector.abs().float()
