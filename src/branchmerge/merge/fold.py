"""One tensor of every model -> the merged tensor; the results of inner nodes of the tree stay in memory."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from branchmerge.merge.arrays import Array, Weights, as_array, as_tensor, converted, in_one_dtype, shares_memory
from branchmerge.merge.operators import Operator, parameters_of
from branchmerge.merge.scan import Change, changes
from branchmerge.merge.tree import Tree

Facts = dict[str, dict[str, float]]
"""What was measured at each node, by its name."""


@dataclass
class TensorFold:
    """The models' tensors of one name, and the measurements made on them so far, which recipes of a sweep share."""

    name: str
    read: Callable[[str], Weights]
    """Reads a leaf's tensor as it is stored; for all leaves an array, or for all a torch tensor."""
    base: Weights | None = None
    check: Callable[[str, Weights], None] | None = None
    """Called with a leaf and its tensor unless the measurement proves it finite; raises on NaN or infinity."""
    _leaves: dict[str, Weights] = field(default_factory=dict)
    _measured: dict[Hashable, Any] = field(default_factory=dict)

    def merge(self, tree: Tree, operator: Operator, facts: Facts | None = None) -> Weights:
        """Fold a tree; `Operator.__call__` describes the dtype of the result."""
        for leaf in tree.leaves:
            if leaf not in self._leaves:
                self._leaves[leaf] = self.read(leaf)
        tensors = [self._leaves[leaf] for leaf in tree.leaves] + ([self.base] if self.base is not None else [])
        widest = in_one_dtype(tensors)
        return self._node(tree, operator, dict(zip(tree.leaves, widest, strict=False)), facts)

    def _node(self, tree: Tree, operator: Operator, leaves: dict[str, Weights], facts: Facts | None) -> Weights:
        if tree.leaf:
            return leaves[tree.leaf]
        # An inner node's result may be wider than the leaves beside it.
        models = in_one_dtype([self._node(child, operator, leaves, facts) for child in tree.children])
        base = converted(self.base, models[0].dtype) if self.base is not None else None
        seeded = _seeded(operator, self.name, tree.name())
        key = self._key(tree, seeded)
        if key not in self._measured:
            self._measured[key] = self._measure(tree, seeded, models, base)
        merged, change = _apply(seeded, self._measured[key], models, base, self._spare(tree, models))
        if facts is not None:
            facts[tree.name()] = seeded.facts(self._measured[key]) | (change or changes(merged, models[0])).facts
        return merged

    def _measure(self, tree: Tree, operator: Operator, models: list[Weights], base: Weights | None) -> Any:
        leaves = [child.leaf for child in tree.children if child.leaf]
        if not operator.proves_finite:
            self._check(leaves)
        measured = operator.measure(*_seen_by(operator, models, base))
        if operator.proves_finite and not operator.shows_finite(measured):
            self._check(leaves)
        return measured

    def _spare(self, tree: Tree, models: list[Weights]) -> Array | None:
        """The result of an inner node, which nothing reads after this node, so it may be overwritten."""
        for child, model in zip(tree.children, models, strict=True):
            if not child.leaf and isinstance(model, np.ndarray) and not shares_memory(model, self._leaves.values()):
                return model
        return None

    def _check(self, leaves: Sequence[str]) -> None:
        for leaf in leaves:
            if self.check is not None:
                self.check(leaf, self._leaves[leaf])

    def _key(self, tree: Tree, operator: Operator) -> Hashable:
        """What a node's measurement depends on: its children, and all parameters that `measure` uses."""
        used = {k: v for k, v in parameters_of(operator).items() if k not in operator.late}
        inner = [child.name() for child in tree.children if not child.leaf]
        children = [str(tree.nested()), str(parameters_of(operator)) if inner else ""]
        return (type(operator).__name__, str(used), *children)


def _seen_by(operator: Operator, models: list[Weights], base: Weights | None) -> tuple[list[Any], Any]:
    """Models and base in the form that the operator takes: as torch tensors, unless it takes arrays."""
    if operator.takes_arrays:
        return models, base
    return [as_tensor(model) for model in models], None if base is None else as_tensor(base)


def _apply(
    operator: Operator, measured: Any, models: list[Weights], base: Weights | None, spare: Array | None
) -> tuple[Weights, Change | None]:
    """The merged tensor, an array if the models are arrays; and its change from Left, where the operator knows it."""
    merged, change = operator.apply_and_compare(measured, *_seen_by(operator, models, base), spare)
    return as_array(merged) if isinstance(models[0], np.ndarray) else merged, change


def _seeded(operator: Operator, tensor: str, node: str) -> Operator:
    """Give an operator that draws a seed of its own for every tensor and node, independent of their order."""
    seed = parameters_of(operator).get("seed")
    if seed is None:
        return operator
    digest = hashlib.sha256(f"{seed}/{tensor}/{node}".encode()).digest()
    return replace(operator, seed=int.from_bytes(digest[:6], "big"))  # type: ignore[call-arg]
