"""The recipes of a sweep: checked together before the first is made, and grouped by what one pass can make.

The recipes of a group have the same parents, so that each tensor is read once for all of them.
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from branchmerge import fingerprints
from branchmerge.errors import UserError
from branchmerge.merge import compatibility
from branchmerge.merge.arrays import is_floating
from branchmerge.merge.checkpoint import Reader, TensorInfo
from branchmerge.merge.recipe import Recipe
from branchmerge.merge.views import Source
from branchmerge.student.backbone import check_checkpoint

BACKBONE = "the backbone"
"""Its name among the leaves."""


@dataclass
class Group:
    """Recipes with the same parents."""

    recipes: Sequence[Recipe]
    folders: dict[str, Path]
    common: compatibility.Common
    seen: dict[Path, tuple[Any, ...]]
    """State of the parents' files when they were opened"""

    def check_unchanged(self) -> None:
        """Refuse parents that were replaced meanwhile: the files that were opened are read, whatever has their names
        now."""
        for folder, state in self.seen.items():
            if fingerprints.state(folder) != state:
                raise UserError(f"{folder}: was changed while it was merged; run the same command again")


def opened(recipes: Sequence[Recipe], stack: ExitStack) -> list[Group]:
    """Open the parents of all groups, each once, and refuse those that do not fit together."""
    readers: dict[Path, Reader] = {}
    seen: dict[Path, tuple[Any, ...]] = {}
    groups = []
    for members in _grouped(recipes):
        folders = {leaf: recipe.folders[leaf] for recipe in members for leaf in recipe.tree.leaves}
        if members[0].base is not None:
            folders[BACKBONE] = members[0].base
        for folder in folders.values():
            if folder not in readers:
                check_checkpoint(folder)
                seen[folder] = fingerprints.state(folder)
                readers[folder] = stack.enter_context(Reader(folder))
        common = compatibility.check({leaf: readers[folder] for leaf, folder in folders.items()}, members[0].vocab)
        tensors = [
            name for name, info in infos_of(common.models[next(iter(folders))]).items() if is_floating(info.dtype)
        ]
        for recipe in members:
            recipe.check_rules(tensors)
        groups.append(Group(members, folders, common, {folder: seen[folder] for folder in folders.values()}))
    return groups


def _grouped(recipes: Sequence[Recipe]) -> list[list[Recipe]]:
    groups: dict[object, list[Recipe]] = {}
    for recipe in recipes:
        # Padding takes a row from the first leaf that has it, so there the leaves' order counts.
        order = tuple(recipe.tree.leaves) if recipe.vocab != "same" else ()
        places = frozenset(recipe.folders.items()), recipe.base, recipe.origin
        groups.setdefault((*places, recipe.device, recipe.vocab, order), []).append(recipe)
    return list(groups.values())


def check_apart(outs: Sequence[Path]) -> None:
    """Refuse two results in one folder, however its path is spelled: the second would wait for the first for ever."""
    places = [out.resolve() for out in outs]
    for out, place in zip(outs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{out}: two members of this sweep would write it; leave out= to their names")


def raise_failed(failed: dict[Path, UserError], members: int) -> NoReturn:
    """Raise one error that names every member that was not made, and why."""
    if members == 1:
        raise next(iter(failed.values()))
    names: dict[str, list[str]] = {}
    for out, error in failed.items():
        names.setdefault(str(error), []).append(out.name)
    said = "; ".join(f"{', '.join(these)}: {error}" for error, these in names.items())
    raise UserError(f"{len(failed)} of {members} members of this sweep were not made: {said}")


def infos_of(reader: Source) -> dict[str, TensorInfo]:
    """All tensors sorted by name, numbers in names by value, independent of their order in the files."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return {name: reader.tensors[name] for name in sorted(reader.tensors, key=natural)}
