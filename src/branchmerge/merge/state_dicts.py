"""Merge state dicts that are in memory: the same operators and trees, without files."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from branchmerge.errors import UserError
from branchmerge.merge.arrays import Weights, as_tensor
from branchmerge.merge.fold import TensorFold
from branchmerge.merge.operators import make_operator
from branchmerge.merge.tree import parse

if TYPE_CHECKING:
    from torch import Tensor

StateDict = Mapping[str, "Tensor"]


def merge_state_dicts(
    models: Mapping[str, StateDict],
    tree: Sequence[Any],
    operator: str = "arcee_fusion",
    base: StateDict | None = None,
    **parameters: Any,
) -> "dict[str, Tensor]":
    """Merge state dicts of one architecture, on any device.

    Args:
        models: state dict by name; the names are the leaves of the tree
        tree: [left, right], nested
        operator: a name in OPERATORS
        base: the backbone's state dict, for operators that need it
        parameters: the operator's

    Returns:
        The merged state dict, in the dtypes of the tree's first leaf.

    Raises:
        UserError: unknown operators, parameters or leaves; tensors that one model lacks, or has in another shape or
            kind; values that are no numbers
    """
    made, parsed = make_operator(operator, parameters), parse(tree)
    for leaf in parsed.leaves:
        if leaf not in models:
            raise UserError(f"tree={parsed.nested()}: there is no model {leaf!r}; there are {', '.join(models)}")
    if made.needs_base() and base is None:
        raise UserError(f"{operator} needs the backbone's state dict; give base=")
    first = models[parsed.leaves[0]]
    others = [(leaf, models[leaf]) for leaf in parsed.leaves[1:]] + ([("base", base)] if base is not None else [])
    for name, other in others:
        _check_same(parsed.leaves[0], first, name, other)
    merged = {}
    for tensor, left in first.items():
        if not left.is_floating_point():
            merged[tensor] = left.clone()
            continue
        leaves = {leaf: models[leaf][tensor] for leaf in parsed.leaves}
        fold = TensorFold(tensor, leaves.__getitem__, None if base is None else base[tensor], partial(_check, tensor))
        merged[tensor] = as_tensor(fold.merge(parsed, made)).to(left.dtype)
    return merged


def _check(tensor: str, leaf: str, value: "Weights") -> None:
    if not bool(as_tensor(value).isfinite().all()):
        raise UserError(f"{leaf}: {tensor} holds values that are no numbers; it cannot be merged")


def _check_same(first: str, a: StateDict, name: str, b: StateDict) -> None:
    lacking = sorted(a.keys() ^ b.keys())
    if lacking:
        raise UserError(f"{first} and {name} cannot be merged: {lacking[0]} is in one of them only")
    for tensor, value in a.items():
        if value.shape != b[tensor].shape:
            raise UserError(
                f"{first} and {name} cannot be merged: {tensor} has the shapes {list(value.shape)} and"
                f" {list(b[tensor].shape)}"
            )
        if value.is_floating_point() != b[tensor].is_floating_point():
            raise UserError(
                f"{first} and {name} cannot be merged: {tensor} holds {value.dtype} in one and {b[tensor].dtype} in the"
                " other"
            )
        if not value.is_floating_point() and not bool((value == b[tensor]).all()):
            raise UserError(f"{first} and {name} cannot be merged: the integers of {tensor} differ")
