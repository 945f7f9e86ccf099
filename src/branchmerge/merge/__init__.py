"""Experts in, one model out: a tree of operators, applied one tensor at a time."""

from branchmerge.merge.recipe import Recipe, from_config
from branchmerge.merge.stream import merge

__all__ = ["Recipe", "from_config", "merge"]
