"""Arcee Fusion with the arithmetic of mergekit 0.1.5, rounding included: what TinyR1's published models went through.

    p = softmax(Right) + 1e-8,  q = softmax(Left) + 1e-8       by row
    S = (sum p log(p / q)) * |Right - Left|
    T = median(S) + lam * (Q3(S) - Q1(S))                      of a random million of S where there are more
    out = Left + (S >= T) * (Right - Left)

Every step is rounded to the models' dtype. The KL is then mostly rounding noise, and Left + (Right - Left) is not
always Right. The result equals mergekit's bit for bit on tensors of up to a million elements (tests/parity). Above that
mergekit samples without a seed; this operator samples with one. For new merges use arcee_fusion.

Source: outputs of mergekit 0.1.5 (Goddard et al., Arcee's MergeKit, arXiv 2403.13257). Shapes: R rows, C columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from branchmerge.merge.operators.arcee_fusion import as_rows
from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.limits import whole
from branchmerge.merge.operators.row_kl import row_blocks

EPSILON = 1e-8
SAMPLE = 1_000_000
"""Elements from which the quartiles are taken, at most."""


@dataclass(frozen=True)
class ArceeFusionMergekit(Operator):
    """Left and Right -> their fusion in the arithmetic of mergekit."""

    lam: float = 1.5
    """lambda of the threshold; mergekit has no other value."""
    seed: int = 42
    """Seed of the samples of large tensors."""

    n_way: ClassVar[bool] = False
    selects: ClassVar[bool] = True
    late = frozenset({"lam"})

    def __post_init__(self) -> None:
        if not isinstance(self.lam, int | float) or math.isnan(self.lam):
            raise ValueError(f"lam must be a number, it is {self.lam!r}")
        object.__setattr__(self, "lam", float(self.lam))
        whole("seed", self.seed, 0)

    def is_portable(self) -> bool:
        return False  # its KL is rounding noise, which depends on the processor's instructions

    def measure(self, models: Sequence[Tensor], base: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """S in the models' dtype, [R, C], and its quartiles."""
        left, right = as_rows(models)
        S = torch.empty_like(left)
        for rows in row_blocks(left):
            p, q = (torch.softmax(model[rows], dim=-1) + EPSILON for model in (right, left))
            kl = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
            S[rows] = kl * (right[rows] - left[rows]).abs()
        if not S.numel():
            return S, [torch.tensor(math.inf)] * 3
        draw = torch.Generator().manual_seed(self.seed)
        median = _quantiles(_sample(S, draw), [0.5])
        q1, q3 = _quantiles(_sample(S, draw), [0.25, 0.75])  # from another sample, as in mergekit
        return S, [q1, *median, q3]

    def apply(self, measured: Any, models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        S, (q1, median, q3) = measured
        left, right = as_rows(models)
        T = torch.full_like(median, self.lam) if math.isinf(self.lam) else median + self.lam * (q3 - q1)
        out = torch.empty_like(left)
        for rows in row_blocks(left):
            mask = (S[rows] >= T).to(left.dtype)
            out[rows] = left[rows] + mask * (right[rows] - left[rows])
        return out.reshape(models[0].shape)

    def facts(self, measured: Any) -> dict[str, float]:
        S, (q1, median, q3) = measured
        if not S.numel():
            return {}
        T = float(median + self.lam * (q3 - q1)) if math.isfinite(self.lam) else self.lam
        return {"S_q1": float(q1), "S_median": float(median), "S_q3": float(q3), "T": T,
                "S_negative": float((S < 0).double().mean())}  # fmt: skip


def _sample(S: Tensor, draw: torch.Generator) -> Tensor:
    """All of S, flat, or a million of its elements, none twice."""
    flat = S.reshape(-1)
    n = flat.numel()
    if n <= SAMPLE:
        return flat
    if n < 4 * SAMPLE:
        places = torch.randperm(n, generator=draw)
    else:  # a permutation of an embedding takes gigabytes; of this many draws, more than a million differ
        drawn = torch.randint(n, (SAMPLE * 5 // 4,), generator=draw).unique()
        places = drawn[torch.randperm(len(drawn), generator=draw)]
    return flat[places[:SAMPLE].to(flat.device)]


def _quantiles(values: Tensor, qs: Sequence[float]) -> list[Tensor]:
    """Element floor(q (n - 1)) of the sorted values for each q."""
    ordered = values.sort().values
    return [ordered[math.floor(q * (ordered.numel() - 1))] for q in qs]
