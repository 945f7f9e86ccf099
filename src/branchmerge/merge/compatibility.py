"""Refuse models that cannot be merged, from their configs and headers alone, before any weight is read.

The one exception is a matrix that a model stores twice, which is read, see tied.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from branchmerge.errors import UserError
from branchmerge.merge import architecture, vocabulary
from branchmerge.merge.arrays import is_floating
from branchmerge.merge.tied import without_copies
from branchmerge.merge.views import Source


@dataclass(frozen=True)
class Common:
    """The models as they are merged, all with the same tensors of the same shapes."""

    models: dict[str, Source]
    tokenizer: Path | None = None
    """Folder of the model whose tokenizer the merged one gets; None for Left's."""
    rows: int | None = None
    """Size of the vocabulary; None for that in Left's config."""


def check(models: Mapping[str, Source], vocab: str = "same") -> Common:
    """Compare all models with the first; raises UserError that names both and says what differs."""
    for name, model in models.items():
        architecture.check_usable(name, model.folder)
    (first, reference), *others = models.items()
    for name, model in others:
        architecture.check_same(first, reference.folder, name, model.folder)
        if vocab == "same":
            vocabulary.check_same(first, reference.folder, name, model.folder)
    common = Common(without_copies(models))
    if vocab != "same":
        common = Common(*vocabulary.unify(common.models, vocab))
    for name, _ in others:
        _check_tensors(first, common.models[first], name, common.models[name])
    return common


def _check_tensors(first: str, reference: Source, name: str, model: Source) -> None:
    missing = sorted(set(reference.tensors) ^ set(model.tensors))
    if missing:
        where = first if missing[0] in reference.tensors else name
        more = f", and {len(missing) - 1} more are in one of them only" if len(missing) > 1 else ""
        raise UserError(
            f"{first} and {name} cannot be merged: the tensor {missing[0]} is in {where} only{more}; merge fine-tunes"
            " of one backbone, or save the other model whole"
        )
    for tensor, info in reference.tensors.items():
        other = model.tensors[tensor]
        if other.shape != info.shape:
            raise UserError(
                f"{first} and {name} cannot be merged: {tensor} has the shapes {list(info.shape)} and"
                f" {list(other.shape)}; merge fine-tunes of one backbone"
            )
        if is_floating(other.dtype) != is_floating(info.dtype):
            raise UserError(
                f"{first} and {name} cannot be merged: {tensor} has the dtypes {info.dtype} and {other.dtype}; merge"
                " fine-tunes of one backbone"
            )
