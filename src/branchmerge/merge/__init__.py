"""Experts in, one model out: a tree of operators, applied one tensor at a time."""

from branchmerge.merge.recipe import Recipe, from_config
from branchmerge.merge.state_dicts import merge_state_dicts
from branchmerge.merge.stream import merge, merge_all

__all__ = ["Recipe", "from_config", "merge", "merge_all", "merge_state_dicts"]
