"""The anatomy of a merge: how the experts' task vectors relate to each other, and what each contributes to the result.

For every tensor, with the task vectors d_i = W_i - W_0 of the leaves and d = W - W_0 of the merged model:

    cosines       <d_i, d_j> / (|d_i| |d_j|), also of d with each; they need the backbone W_0
    taken         where the leaves are not all equal: share of the coordinates with W = W_i, bit for bit
    overlap       of two leaves' taken coordinates, |A and B| / |A or B| (Jaccard)
    same sign     where d is not zero: share of the coordinates where d_i has its sign

`taken` is meaningful for operators that select, as averaged values are seldom equal to a leaf's; `same sign` always is.
The whole model's numbers are those of the concatenation of its tensors. Shapes: K leaves, M = K + 1.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from branchmerge.errors import UserError
from branchmerge.merge import anatomy_kernels
from branchmerge.merge.arrays import Array, converted, promoted
from branchmerge.merge.checkpoint import Reader
from branchmerge.merge.scan import flat
from branchmerge.merge.threads import workers
from branchmerge.merge.views import Source

NEAR_ORTHOGONAL = 0.1
"""Task vectors with a smaller |cosine| count as near-orthogonal. The paper gives no number; this one is ours."""
PART = 1 << 20
"""Elements that a thread compares at a time; fixed, so that sums do not depend on the number of threads."""
MERGED = "merged"


@dataclass
class Counts:
    """Sums over coordinates; see `anatomy_kernels.compare`."""

    taken: NDArray[np.int64]
    """[M, M]"""
    gram: NDArray[np.float64]
    """[M, M], upper half"""
    signs: NDArray[np.int64]
    """[M]"""

    @classmethod
    def zero(cls, leaves: int) -> "Counts":
        m = leaves + 1
        return cls(np.zeros((m, m), np.int64), np.zeros((m, m)), np.zeros(m, np.int64))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.taken + other.taken, self.gram + other.gram, self.signs + other.signs)

    @property
    def norms(self) -> list[float]:
        """|d| of the leaves and of the merged model."""
        return [math.sqrt(square) for square in np.diagonal(self.gram).tolist()]

    def cosine(self, j: int, k: int) -> float | None:
        """None where one of the two task vectors is zero."""
        size = self.norms[j] * self.norms[k]
        return float(np.clip(self.gram[min(j, k), max(j, k)] / size, -1.0, 1.0)) if size else None

    def taken_share(self, k: int) -> float | None:
        """None where the leaves are equal everywhere."""
        return _share(self.taken[k, k], self.taken[-1, -1])

    def overlap(self, j: int, k: int) -> float | None:
        both = self.taken[min(j, k), max(j, k)]
        return _share(both, self.taken[j, j] + self.taken[k, k] - both)

    def same_sign(self, k: int) -> float | None:
        return _share(self.signs[k], self.signs[-1])


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None


def compare(merged: Array, leaves: Sequence[Array], base: Array | None) -> Counts:
    """Compare tensors of one shape, in any floating-point dtypes."""
    tensors = [*leaves, merged, *([base] if base is not None else [])]
    dtype = promoted(tensor.dtype for tensor in tensors)
    arrays = [np.ascontiguousarray(tensor).reshape(-1) for tensor in tensors]

    def compared(part: slice) -> Counts:
        # Where dtypes differ, each part is converted on its own, to save memory.
        stored = [flat(converted(array[part], dtype)) for array in arrays]
        models = tuple(stored[: len(leaves) + 1])
        counts = Counts.zero(len(leaves))
        origin = stored[-1] if base is not None else stored[0][:0]
        anatomy_kernels.compare(models, origin, counts.taken, counts.gram, counts.signs)
        return counts

    parts = [slice(start, start + PART) for start in range(0, merged.size, PART)]
    return sum(workers.each(compared, parts), Counts.zero(len(leaves)))


@dataclass
class Anatomy:
    """Collects the numbers of every tensor of a merge, and sums them up for the whole model."""

    leaves: Sequence[str]
    """From left to right, as in the tree."""
    base: Source | None
    """The backbone's checkpoint, where it is known"""
    total: Counts = field(init=False)

    def __post_init__(self) -> None:
        self.total = Counts.zero(len(self.leaves))
        self.names = short_names(self.leaves)

    def compare(self, name: str, merged: Array, leaves: Sequence[Array]) -> Counts:
        """Compare one tensor with the leaves; thread-safe."""
        base = self.base
        return compare(merged, leaves, base.read(name) if base is not None else None)

    def add(self, name: str, counts: Counts) -> dict[str, Any]:
        """Add a tensor's counts to the whole; called in a fixed order, so that sums do not depend on threads.

        Returns:
            The tensor's numbers, for tensors.json.
        """
        if self.base is not None and not np.isfinite(counts.gram).all():
            print(f"anatomy: {self.base.folder}: {name} holds NaN or infinity, so there are no cosines", flush=True)
            self.base = None
        self.total += counts
        return self._numbers(counts)

    def summary(self) -> dict[str, Any]:
        """The whole model's numbers, for anatomy.json."""
        return {"leaves": list(self.leaves), "near_orthogonal_below": NEAR_ORTHOGONAL, **self._numbers(self.total)}

    def _numbers(self, counts: Counts) -> dict[str, Any]:
        names, K = self.names, len(self.leaves)
        pairs = [(j, k) for j in range(K) for k in range(j + 1, K)]
        numbers: dict[str, Any] = {
            "contested": int(counts.taken[-1, -1]),
            "taken": {names[k]: counts.taken_share(k) for k in range(K)},
            "overlap": {f"{names[j]} {names[k]}": counts.overlap(j, k) for j, k in pairs},
        }
        if self.base is None:
            return numbers
        models = [*names, MERGED]
        return numbers | {
            "norms": dict(zip(models, counts.norms, strict=True)),
            "cosines": {
                f"{models[j]} {models[k]}": counts.cosine(j, k) for j in range(K + 1) for k in range(j + 1, K + 1)
            },
            "same_sign": {names[k]: counts.same_sign(k) for k in range(K)},
        }


@contextmanager
def opened(folder: Path | None, model: Source) -> Iterator[Source | None]:
    """The backbone, if it is known and has the tensors of the models; else None, and a printed line that says why."""
    with ExitStack() as stack:
        base = None
        if folder is None:
            why = "the backbone is not known, so there are no cosines; give it with backbone.path=/its/folder"
        else:
            try:
                base = stack.enter_context(Reader(folder))
                why = _misfit(base, model)
            except UserError as error:
                why = f"the backbone is left out: {error}"
        if why:
            print(f"anatomy: {why}", flush=True)
        yield None if why else base


def _misfit(base: Source, model: Source) -> str:
    """Why a checkpoint cannot be the backbone of a model; empty if it can."""
    for name, info in model.tensors.items():
        found = base.tensors.get(name)
        if found is None or found.shape != info.shape:
            shapes = f"{list(info.shape)} and {list(found.shape) if found else 'missing'}"
            return f"{base.folder} is no backbone of these models ({name}: {shapes}); it is left out"
    return ""


def in_words(summary: Mapping[str, Any], selects: bool) -> list[str]:
    """The anatomy in a line or two."""
    lines = []
    if "cosines" in summary:
        lines.append(f"task vectors: {_orthogonality(summary['cosines'])}")
    shares = [("takes", "taken")] if selects else []
    shares += [("has the sign of", "same_sign")] if "same_sign" in summary else []
    told = [f"{verb} {_listed(summary[key])}" for verb, key in shares]
    if told:
        lines.append(f"merged model: {'; '.join(told)} (shares of the values that differ)")
    return lines


def _orthogonality(cosines: Mapping[str, float | None]) -> str:
    between = {pair: c for pair, c in cosines.items() if not pair.endswith(f" {MERGED}") and c is not None}
    if not between:
        return "no two of them differ from zero, so they have no cosines"
    listed = "cosines " + ", ".join(f"{pair.replace(' ', '-')} {c:z.2f}" for pair, c in between.items())
    far = {pair: c for pair, c in between.items() if abs(c) >= NEAR_ORTHOGONAL}
    if not far:
        return f"{listed}: near-orthogonal (all |cos| < {NEAR_ORTHOGONAL}), as the paper assumes"
    worst = max(far, key=lambda pair: abs(far[pair]))
    return f"{listed}: not orthogonal ({worst.replace(' ', '-')} {far[worst]:z.2f}), though the paper assumes so"


def _listed(shares: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {'-' if share is None else format(share, '.2f')}" for name, share in shares.items())


def short_names(leaves: Sequence[str]) -> list[str]:
    """Names of the leaves; folders by the last part of their path, if that is unique."""
    short = [Path(leaf).name for leaf in leaves]
    good = len({*short, MERGED}) == len(short) + 1 and all(name and " " not in name for name in short)
    return short if good else [f"model{number}" for number in range(1, len(leaves) + 1)]
