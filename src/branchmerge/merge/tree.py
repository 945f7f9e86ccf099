"""Merge trees: who is merged with whom, in which order.

[code, [science, math]]          code
means: science and math          |    `-- first:  inner = op(Left = science, Right = math)
first, then code with that       `-- then:        out   = op(Left = code,    Right = inner)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from branchmerge.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Tree:
    """A leaf (a domain or a checkpoint folder) or a node of two or more trees, Left first."""

    leaf: str = ""
    children: tuple[Tree, ...] = ()

    @property
    def leaves(self) -> list[str]:
        """Leaves from left to right."""
        return [self.leaf] if self.leaf else [leaf for child in self.children for leaf in child.leaves]

    def fold(self, read: Callable[[str], T], fuse: Callable[[Sequence[T]], T]) -> T:
        """Replace leaves by what `read` gives and nodes by what `fuse` makes of their children."""
        return read(self.leaf) if self.leaf else fuse([child.fold(read, fuse) for child in self.children])

    def flat(self) -> Tree:
        """One node over all leaves."""
        return Tree(children=tuple(Tree(leaf) for leaf in self.leaves))

    def nested(self) -> Any:
        """As nested lists, the form of the configuration."""
        return self.leaf or [child.nested() for child in self.children]

    def name(self) -> str:
        """For folder names: leaves joined by +, the outer a join the more of them: code++science+math."""
        return self._name(self._depth())

    def _depth(self) -> int:
        return 1 + max((child._depth() for child in self.children), default=-1)

    def _name(self, level: int) -> str:
        return self.leaf or ("+" * level).join(child._name(level - 1) for child in self.children)


def parse(raw: Any) -> Tree:
    """Nested lists -> Tree; raises UserError on anything else, on nodes of one, and on repeated leaves."""
    tree = _parse(raw)
    repeated = {leaf for leaf in tree.leaves if tree.leaves.count(leaf) > 1}
    if repeated:
        raise UserError(f"tree={raw}: {sorted(repeated)[0]} stands in it twice; each model may be merged once")
    if tree.leaf:
        raise UserError(f"tree={raw}: one model alone is nothing to merge; write [left, right], nested as you like")
    return tree


def _parse(raw: Any) -> Tree:
    if isinstance(raw, str) and raw:
        return Tree(raw)
    if isinstance(raw, Sequence) and not isinstance(raw, str) and len(raw) >= 2:
        return Tree(children=tuple(_parse(child) for child in raw))
    raise UserError(f"tree: {raw!r} is neither a domain, nor a folder, nor a list of two or more; write [left, right]")
