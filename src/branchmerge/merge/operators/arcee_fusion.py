"""Arcee Fusion: keep Left, and take Right where the two differ in an important way.

As in the code of TinyR1-32B-Preview's authors (mergekit 0.1), but in exact arithmetic:

    S = KL(Right || Left) * |Left - Right|      KL by row, over softmax of the last dimension
    T = median(S) + lam * (Q3(S) - Q1(S))       exact order statistics, no sampling
    out = Right where S >= T, else Left

Where one KL covers the whole tensor (a vector, or kl=tensor) it does not affect the mask, so S is computed without it.

The KL of two fine-tunes of one backbone is about 1e-8; softmax and logarithm in float32 return mostly rounding noise
there, so it is computed in a form without cancellation. On a CPU the loops of selection_kernels.py do the work,
elementwise in float32, the sums and T in float64; elsewhere, and with precision=float64, the same formulas run in
float64 torch (row_kl.py).

Source: TinyR1-32B-Preview (arXiv 2503.04872) and its authors' code. Shapes: R rows, C columns; a vector is one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from branchmerge.merge import selection_kernels as kernels
from branchmerge.merge.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Array,
    Weights,
    as_array,
    as_tensor,
    bits,
    on_cpu,
    row_length,
)
from branchmerge.merge.operators.base import Operator
from branchmerge.merge.operators.quartiles import (
    quartile_places,
    quartiles,
    quartiles_by_histogram,
    sum_of_counts,
    threshold,
)
from branchmerge.merge.scan import Change
from branchmerge.merge.threads import workers

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 15
"""Tensors of up to this many elements are sorted whole."""
KL_RANGE = (2.0**-150, 2.0**12)
"""The largest KL of a tensor must lie in this range for S to fit into float32."""
CHOICES = {
    "kl": ("row", "tensor"),
    "direction": ("right_left", "left_right"),
    "delta": ("absolute", "signed"),
    "gate": ("ge", "gt"),
    "precision": ("exact", "float64", "float32", "bfloat16"),
}


@dataclass(frozen=True)
class Measured:
    """What the threshold needs, whatever lambda is."""

    kl: NDArray[np.float64]
    """[R]"""
    quartiles: tuple[float, float, float]
    """Q1, median and Q3 of S; where the KL is common, of S divided by it"""
    elements: int
    compiled: bool
    """S is computed in float32 by selection_kernels.py, not in float64 by torch"""
    common: bool = False
    """One KL covers all elements"""

    @property
    def factors(self) -> NDArray[np.float64]:
        """What |Left - Right| is multiplied by in the scores, [R]."""
        return _factors(self.kl, self.common)

    @property
    def quartiles_of_s(self) -> tuple[float, float, float]:
        divisor = abs(float(self.kl[0])) if self.common else 1.0
        q1, median, q3 = (value * divisor for value in self.quartiles)
        return q1, median, q3


@dataclass(frozen=True)
class ArceeFusion(Operator):
    """Left and Right -> their selective fusion."""

    lam: float = 1.5
    """lambda of the threshold; the larger, the less is taken from Right."""
    kl: str = "row"
    """row: a KL for each row (last dimension), as in the authors' code; tensor: one over the flattened tensor."""
    direction: str = "right_left"
    """right_left: KL(Right || Left), as in the code; left_right: KL(Left || Right), as in the paper."""
    delta: str = "absolute"
    """absolute: |Left - Right|, as in the code; signed: Left - Right, as in the paper's Eq. 1."""
    gate: str = "ge"
    """ge: Right where S >= T, as in the code; gt: where S > T, as in the paper's Eq. 7."""
    precision: str = "exact"
    """exact: within 1e-5 of float64 or better; float64: all arithmetic in float64, slow; float32, bfloat16: softmax and
    logarithm in that dtype with 1e-8 added, which shows what rounding does to the mask."""

    n_way: ClassVar[bool] = False
    selects: ClassVar[bool] = True
    late = frozenset({"lam", "gate"})
    takes_arrays: ClassVar[bool] = True
    proves_finite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.lam, int | float) or math.isnan(self.lam):
            raise ValueError(f"lam must be a number, it is {self.lam!r}")
        object.__setattr__(self, "lam", float(self.lam))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, it is {getattr(self, name)!r}")

    def is_portable(self) -> bool:
        return self.precision in ("exact", "float64")

    def measure(self, models: Sequence[Weights], base: Weights | None = None) -> Measured:
        left, right = as_rows(models)
        if not len(left):
            return Measured(np.empty(0), quartiles(np.empty(0)), 0, compiled=True)
        found = self._measure_compiled(left, right) if self.precision == "exact" and _compiled_for(left) else None
        return self._measure_torch(as_tensor(left), as_tensor(right)) if found is None else found

    def _measure_compiled(self, left: Weights, right: Weights) -> Measured | None:
        """Measure with selection_kernels.py; None if the KL is so large or small that S could leave the range of
        float32."""
        x, y = _stored(right), _stored(left)
        kl, common = np.empty(len(x)), self._common(left)
        swapped, signed = self.direction == "left_right", self.delta == "signed"
        if common:
            kernels.measure(x.reshape(1, -1), y.reshape(1, -1), swapped, False, signed, kl[:1], np.zeros(0, np.int32))
            kl[:] = kl[:1]
        factors = _factors(kl, common)  # unless the KL is common this is kl itself, which the kernel fills

        def count(part: slice) -> Any:
            counts = np.zeros(kernels.KEYS if x.size > SMALL else 0, np.int32)
            kernels.measure(x[part], y[part], swapped, common, signed, factors[part], counts)
            return counts

        counts = workers.share(count, *x.shape)
        if not (KL_RANGE[0] < kl.max(initial=0.0) < KL_RANGE[1] or not kl.any()):
            return None

        def gather(keys: Any, room: int) -> Any:
            def found(part: slice) -> Any:
                out = np.empty(room, np.float32)
                return out[: kernels.gather(x[part], y[part], factors[part], signed, keys, out)]

            return np.concatenate(workers.share(found, *x.shape))

        if x.size <= SMALL:
            S = np.empty(x.shape, np.float32)
            kernels.scores(x, y, factors, signed, S)
            scaled = quartiles(S)
        else:
            scaled = quartiles_by_histogram(sum_of_counts(counts), x.size, gather)
        q1, median, q3 = (value / kernels.SCALE for value in scaled)
        return Measured(kl, (q1, median, q3), x.size, compiled=True, common=common)

    def _common(self, left: Weights) -> bool:
        """Whether one KL covers the whole tensor."""
        return self.kl == "tensor" or len(left) == 1

    def _measure_torch(self, left: Tensor, right: Tensor) -> Measured:
        import torch

        from branchmerge.merge.operators.radix_select import select
        from branchmerge.merge.operators.row_kl import DEVICE_BLOCK, kl_of_rows, row_blocks

        p, q = (right, left) if self.direction == "right_left" else (left, right)
        if self.kl == "tensor":
            p, q = p.reshape(1, -1), q.reshape(1, -1)
        kl = kl_of_rows(p, q, self.precision).expand(len(left))
        common = self._common(left)
        factors = kl.sign() if common else kl

        def scores() -> Iterator[Tensor]:
            return (self._scores(factors[rows], left[rows], right[rows]) for rows in row_blocks(left))

        places = quartile_places(left.numel())
        if on_cpu(left):
            q1, median, q3 = quartiles(as_array(torch.cat(list(scores()))))
        elif left.numel() <= DEVICE_BLOCK:
            q1, median, q3 = torch.cat(list(scores())).flatten().sort().values[places].tolist()
        else:
            q1, median, q3 = select(scores, places)
        return Measured(as_array(kl), (q1, median, q3), left.numel(), compiled=False, common=common)

    def _scores(self, factors: Tensor, left: Tensor, right: Tensor) -> Tensor:
        d = left.double() - right.double()
        return factors[:, None] * (d if self.delta == "signed" else d.abs())

    def apply(self, measured: Measured, models: Sequence[Weights], base: Weights | None = None) -> Any:
        return self.apply_and_compare(measured, models, base)[0]

    def apply_and_compare(
        self, measured: Measured, models: Sequence[Weights], base: Weights | None = None, spare: Array | None = None
    ) -> tuple[Any, Change | None]:
        merged, _, change = self.fuse(measured, models, spare)
        return (merged if isinstance(models[0], np.ndarray) else as_tensor(merged)), change

    def fuse(
        self, measured: Measured, models: Sequence[Weights], spare: Array | None = None
    ) -> tuple[Weights, int, Change | None]:
        """The merged tensor, the number of coordinates taken from Right, and the change from Left where it is known."""
        if not measured.elements:
            return models[0], 0, None
        T = threshold(measured.quartiles, self.lam)
        left, right = as_rows(models)
        if measured.compiled:
            out = None if spare is None else spare.reshape(left.shape)
            merged, taken, change = self._fuse_compiled(measured.factors, T, left, right, out)
            return merged.reshape(models[0].shape), taken, change
        chosen, taken = self._fuse_torch(measured.factors, T, as_tensor(left), as_tensor(right))
        return chosen.reshape(models[0].shape), taken, None

    def _fuse_compiled(
        self, factors: NDArray[np.float64], T: float, left: Weights, right: Weights, spare: Array | None
    ) -> tuple[Array, int, Change]:
        x, y = _stored(right), _stored(left)
        strict = self.gate == "gt"
        scaled = _rounded(T * kernels.SCALE, down=strict)
        dtype = as_array(left[:0]).dtype
        o = _room_for(x, dtype, spare)
        update, norm = np.empty(len(x)), np.empty(len(x))

        def choose(rows: slice) -> Any:
            parts = x[rows], y[rows], factors[rows]
            return kernels.choose(*parts, self.delta == "signed", scaled, strict, o[rows], update[rows], norm[rows])

        taken, changed = np.sum(workers.share(choose, *x.shape), axis=0).tolist()
        change = Change(changed, math.sqrt(update.sum()), math.sqrt(norm.sum()), x.size)
        return (o.astype(dtype) if dtype == FLOAT16 else o.view(dtype)), taken, change

    def _fuse_torch(self, factors: NDArray[np.float64], T: float, left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        from branchmerge.merge.operators.row_kl import row_blocks

        there = as_tensor(factors.copy()).to(left.device)
        out, taken = left.clone(), 0
        for rows in row_blocks(left):
            S = self._scores(there[rows], left[rows], right[rows])
            mask = S > T if self.gate == "gt" else S >= T
            out[rows] = right[rows].where(mask, left[rows])
            taken += int(mask.sum())
        return out, taken

    def shows_finite(self, measured: Measured) -> bool:
        return bool(np.isfinite(measured.kl).all())

    def facts(self, measured: Measured) -> dict[str, float]:
        if not measured.elements:
            return {}
        q1, median, q3 = measured.quartiles_of_s
        return {
            "kl_min": float(measured.kl.min()), "kl_median": quartiles(measured.kl)[1],
            "kl_max": float(measured.kl.max()), "S_q1": q1, "S_median": median, "S_q3": q3,
            "T": threshold(measured.quartiles_of_s, self.lam),
        }  # fmt: skip


def _factors(kl: NDArray[np.float64], common: bool) -> NDArray[np.float64]:
    """What |Left - Right| is multiplied by in the scores: the KL, or its sign where it is common to all elements.

    Differences of bfloat16 models take few distinct values, each shared by thousands of elements. Where T is one of
    these values, rounding in its product with a common KL would decide about all these elements.
    """
    return np.sign(kl) if common else kl


def _rounded(value: float, down: bool) -> np.float32:
    """The nearest float32 on one side of a value, so that float32 numbers compare with it as with the value itself."""
    with np.errstate(over="ignore"):
        nearest = np.float32(value)
    if down and float(nearest) > value:  # float(): numpy would round `value` to float32 for the comparison
        return np.nextafter(nearest, np.float32(-np.inf))
    if not down and float(nearest) < value:
        return np.nextafter(nearest, np.float32(np.inf))
    return nearest


def as_rows(models: Sequence[Any]) -> tuple[Any, Any]:
    """Left and Right as [R, C], still arrays or tensors."""
    left, right = (model.reshape(-1, row_length(model)) for model in models)
    return left, right


def _compiled_for(weights: Weights) -> bool:
    return on_cpu(weights) and as_array(weights[:0]).dtype in (BFLOAT16, FLOAT16, FLOAT32)


def _stored(weights: Weights) -> Array:
    """The array that the kernels take: float16 as float32, which represents all its values; others as stored."""
    array = np.ascontiguousarray(as_array(weights))
    return array.astype(FLOAT32) if array.dtype == FLOAT16 else bits(array)


def _room_for(right: Array, dtype: np.dtype[Any], spare: Array | None) -> Array:
    """An array for the merged values, in the form that the kernels take."""
    if dtype == FLOAT16:
        return right  # `_stored` made this copy of Right, and nothing reads it later
    # numpy's large arrays are made of large pages, which cost a tenth of torch's.
    return np.empty_like(right) if spare is None else _stored(spare)
