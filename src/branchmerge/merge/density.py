"""How much each node of the tree changed its Left child: in total, and by layer and type of module."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from branchmerge.merge.rules import GROUPS, Rule, layer_of

ORDER = (
    "embeddings", "norms", "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj",
    "down_proj",
)  # fmt: skip
"""Types of modules that are listed first, in this order."""

Entry = Mapping[str, Any]
"""A row of tensors.json."""


@dataclass(frozen=True)
class Change:
    """The change of all tensors of one layer and type of module, or of the whole model."""

    density: float
    """Share of the values that are not Left's"""
    relative_update: float
    """Norm of the update / norm of Left"""
    elements: int


def module_of(tensor: str) -> str:
    """Type of module that a tensor belongs to: q_proj, norms, embeddings, ..."""
    for group in ("embeddings", "norms"):
        if Rule(GROUPS[group], None, {}).holds_for(tensor):
            return group
    parts = [part for part in tensor.split(".") if not part.isdigit()]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def by_node(table: Sequence[Entry]) -> dict[str, Change]:
    """Each node's change of the whole model, inner nodes first."""
    nodes = dict.fromkeys(node for entry in table for node in entry["nodes"])
    return {node: _total(table, node) for node in nodes}


def by_place(table: Sequence[Entry], node: str) -> dict[tuple[int | None, str], Change]:
    """A node's change by layer (None: outside of the layers) and type of module."""
    places: dict[tuple[int | None, str], list[Entry]] = {}
    for entry in table:
        places.setdefault((layer_of(entry["tensor"]), module_of(entry["tensor"])), []).append(entry)
    return {place: _total(entries, node) for place, entries in places.items()}


def modules_in_order(modules: Iterable[str]) -> list[str]:
    """Types of modules: those of ORDER first, then the others by name."""
    return sorted(set(modules), key=lambda module: (ORDER.index(module) if module in ORDER else len(ORDER), module))


def _total(entries: Sequence[Entry], node: str) -> Change:
    sizes = [math.prod(entry["shape"]) for entry in entries]
    facts = [entry["nodes"][node] for entry in entries]
    elements = sum(sizes)
    changed = sum(round(fact["changed"] * size) for fact, size in zip(facts, sizes, strict=True))
    update, left = (math.hypot(*(fact[key] for fact in facts)) for key in ("update_norm", "left_norm"))
    return Change(changed / max(elements, 1), update / left if left else 0.0, elements)
