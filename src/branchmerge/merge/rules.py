"""Rules: other parameters for some tensors, by name or by layer.

    rules: [{tensors: mlp, lam: 1.0}, {tensors: "*embed*", layers: [0, 11], weights: [1, 0.5, 0.5]}]

A rule selects tensors (file-name patterns, or a name of GROUPS; default: all) and layers (first and last, both
included), and sets parameters of the operator for them. Where several rules set a parameter, the last one counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from branchmerge.errors import UserError

GROUPS = {
    "embeddings": ("*embed*", "*lm_head*", "*wte*"),
    "attention": ("*attn.*", "*attention.*"),  # tensors in such a module, not a norm named after it
    "mlp": ("*mlp.*", "*feed_forward.*", "*block_sparse_moe.*"),
    "norms": ("*norm*", "*ln_*"),
}
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Rule:
    """Tensors and layers, and the parameters that differ there."""

    patterns: tuple[str, ...]
    layers: tuple[int, int] | None
    parameters: Mapping[str, Any]

    def entry(self) -> dict[str, Any]:
        """As in the configuration."""
        where = {"tensors": list(self.patterns), **({"layers": list(self.layers)} if self.layers else {})}
        return {**where, **self.parameters}

    def holds_for(self, tensor: str) -> bool:
        if not any(fnmatchcase(tensor, pattern) for pattern in self.patterns):
            return False
        if self.layers is None:
            return True
        layer = layer_of(tensor)
        return layer is not None and self.layers[0] <= layer <= self.layers[1]


def layer_of(tensor: str) -> int | None:
    """Number of the layer that a tensor belongs to, by its name."""
    found = LAYER.search(tensor)
    return int(found[1]) if found else None


def parse_rules(raw: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """The configuration's rules; raises UserError on an entry that is not one."""
    return tuple(_parse(dict(entry)) if isinstance(entry, Mapping) else _refuse(entry) for entry in raw)


def _parse(entry: dict[str, Any]) -> Rule:
    whole = dict(entry)
    named, layers = entry.pop("tensors", "*"), entry.pop("layers", None)
    names = [named] if isinstance(named, str) else list(named)
    patterns = tuple(pattern for name in names for pattern in GROUPS.get(name, (name,)))
    if layers is not None:
        layers = (layers, layers) if isinstance(layers, int) else tuple(layers)
        if len(layers) != 2 or not all(isinstance(n, int) for n in layers) or layers[0] > layers[1]:
            raise UserError(f"rules: layers={list(layers)} is not [first, last]; write layers: [0, 11]")
    if not entry:
        _refuse(whole)
    return Rule(patterns, layers, entry)


def _refuse(entry: Any) -> Rule:
    raise UserError(f"rules: {entry!r} changes nothing; write {{tensors: mlp, layers: [0, 11], lam: 0.5}}")
