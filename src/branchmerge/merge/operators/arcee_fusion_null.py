"""Null controls of Arcee Fusion: the same number of coordinates from Right, chosen without the importance score.

    random   each coordinate with the probability that equals arcee_fusion's density
    delta    the coordinates with the largest |Left - Right|
    kl       whole rows with the largest KL, and a part of one more row

If a merge by one of these scores as well as arcee_fusion, the importance score made no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from branchmerge.merge.arrays import Array, Weights, as_tensor
from branchmerge.merge.operators.arcee_fusion import ArceeFusion, Measured, as_rows
from branchmerge.merge.operators.blocks import blocks
from branchmerge.merge.operators.largest import largest
from branchmerge.merge.operators.limits import whole
from branchmerge.merge.operators.task_vectors import magnitude, magnitudes

WAYS = ("random", "delta", "kl")


@dataclass(frozen=True)
class ArceeFusionNull(ArceeFusion):
    """Left and Right -> a fusion of the same density; the other parameters are those of arcee_fusion."""

    by: str = "random"
    """random, delta or kl: what chooses the coordinates."""
    seed: int = 42
    """Seed of the random choice."""

    late = frozenset({"lam", "gate", "by", "seed"})
    takes_arrays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in WAYS:
            raise ValueError(f"by must be one of {', '.join(WAYS)}, it is {self.by!r}")
        whole("seed", self.seed, 0)

    def apply_and_compare(
        self, measured: Measured, models: Sequence[Weights], base: Weights | None = None, spare: Array | None = None
    ) -> tuple[Tensor, None]:
        return self.apply(measured, models, base), None

    def apply(self, measured: Measured, models: Sequence[Weights], base: Weights | None = None) -> Tensor:
        _, taken, _ = self.fuse(measured, models)
        left, right = as_rows(models)
        choice = {"random": self._random, "delta": _by_delta, "kl": _by_kl}[self.by]
        mask = choice(taken, measured, left, right)
        return torch.where(mask, right, left).reshape(models[0].shape)

    def _random(self, taken: int, measured: Measured, left: Tensor, right: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        share = taken / max(left.numel(), 1)
        return (torch.rand(left.shape, generator=draw) < share).to(left.device)


def _by_delta(taken: int, measured: Measured, left: Tensor, right: Tensor) -> Tensor:
    take = largest(magnitudes(right, left), taken)[0].taker()
    mask = torch.empty(left.numel(), dtype=torch.bool, device=left.device)
    for place, (x, y) in blocks([right, left]):
        mask[place] = take(magnitude(x - y))
    return mask.reshape(left.shape)


def _by_kl(taken: int, measured: Any, left: Tensor, right: Tensor) -> Tensor:
    columns = left.shape[1]
    mask = torch.zeros_like(left, dtype=torch.bool)
    order = as_tensor(measured.kl.copy()).to(left.device).argsort(descending=True, stable=True)
    whole_rows = taken // columns
    mask[order[:whole_rows]] = True
    if taken % columns:
        mask[order[whole_rows], : taken % columns] = True
    return mask
