"""Checkpoints in, checkpoint out: for every tensor, map it from each leaf, fold the tree, write it.

    parents (mapped files) --> fold of recipe 1 --> writer thread --> shards of result 1
                          \\-> fold of recipe 2 --> writer thread --> shards of result 2

Recipes over the same parents are made in one pass. One tensor of each model is in memory at a time.
"""

import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from branchmerge import fingerprints
from branchmerge.errors import UserError
from branchmerge.files import write_rows
from branchmerge.merge import anatomy, anatomy_report, card, compatibility, recipe_file, tokenizer_files
from branchmerge.merge.anatomy import Anatomy, Counts
from branchmerge.merge.arrays import Array, Weights, as_array, as_tensor, converted, is_floating, shares_memory
from branchmerge.merge.checkpoint import TensorInfo, Writer
from branchmerge.merge.fold import Facts, TensorFold
from branchmerge.merge.groups import BACKBONE, Group, check_apart, infos_of, opened, tell_lost
from branchmerge.merge.operators import parameters_of
from branchmerge.merge.parents import check_expected, parents_of
from branchmerge.merge.recipe import Recipe
from branchmerge.merge.scan import changes, check_finite, has_special
from branchmerge.merge.threads import keep_freed_memory, workers
from branchmerge.merge.views import Source
from branchmerge.merge.vocabulary import write_config
from branchmerge.student.export import copy_tokenizer
from branchmerge.study import MANIFEST, Manifest, fingerprint, is_done, locked, publish, read_manifest

TABLE = "tensors.json"
SIDE_BY_SIDE = 1 << 25
"""Bytes of a tensor up to which several are merged side by side; larger ones are shared by all threads."""
AHEAD = 1 << 27
"""Bytes of results that may be made before the writers want them: they keep the threads busy while a disk hesitates."""


def merge(recipe: Recipe) -> Path:
    """Make the merged checkpoint of a recipe; finished work is not done again.

    Returns:
        Its folder.

    Raises:
        UserError: the parents do not fit together, one holds NaN, or the disk is too small.
    """
    return merge_all([recipe])[0]


def merge_all(recipes: Sequence[Recipe]) -> list[Path]:
    """Make the merged checkpoints of several recipes; those over the same parents share one pass over them.

    Raises:
        UserError: before the first begins, where models do not fit together or a place is taken; after the last, where
            some could not be made, such as those of a parent with NaN. It names them, and the others are made.
    """
    keep_freed_memory()
    outs = [recipe.out for recipe in recipes]
    check_apart(outs)
    lost: dict[Path, UserError] = {}
    with ExitStack() as stack:
        groups = opened(recipes, stack)
        for recipe in sorted(recipes, key=lambda recipe: recipe.out.resolve()):
            stack.enter_context(locked(recipe.out))
            _check_place(recipe)
        for group in groups:
            lost |= _merge_group(group)
    if lost:
        tell_lost(lost, len(recipes))
    return outs


@dataclass
class _Merged:
    """A tensor of a result, and what is told of it; an integer tensor was only taken over."""

    tensor: Array
    changed: int = 0
    """Elements that differ from the first leaf's"""
    entry: dict[str, Any] | None = None
    """For the table of tensors"""
    counts: Counts | None = None
    """For the anatomy"""


@dataclass
class _Result:
    """A recipe on its way to a folder."""

    recipe: Recipe
    planned: Manifest
    folder: Path
    writer: Writer
    closing: Sequence[ExitStack]
    """What ends the writing, then the folder"""
    table: list[dict[str, Any]] = field(default_factory=list)
    differing: int = 0
    anatomy: Anatomy | None = None
    said: list[str] = field(default_factory=list)
    lost: UserError | None = None
    """Why it cannot be made, while others beside it can"""

    def take(self, name: str, merged: _Merged | UserError) -> None:
        """Hand the next tensor to the writer, and keep what is told of it."""
        if self.lost is not None:  # when later tensors were underway
            return
        if isinstance(merged, UserError):
            self._give_up(merged)
            return
        self.writer.write(name, merged.tensor)
        self.differing += merged.changed
        if merged.entry is not None:
            told = self.anatomy.add(name, merged.counts) if self.anatomy and merged.counts else {}
            self.table.append(merged.entry | told)

    def _give_up(self, error: UserError) -> None:
        """Remove what was written, at once, as those beside it need the room."""
        self.lost = error
        for stack in self.closing:
            stack.__exit__(type(error), error, None)


def _merge_group(group: Group) -> dict[Path, UserError]:
    """Make the results of a group; returns why some could not be made."""
    for folder in group.folders.values():
        fingerprints.begin(folder)
    lost: dict[Path, UserError] = {}
    work = []
    for recipe in group.recipes:
        try:
            planned = _left_to_do(recipe)
        except UserError as error:
            lost[recipe.out] = error
            continue
        if planned is None:
            print(f"{recipe.out}: done already", flush=True)
        else:
            work.append((recipe, planned))
    leaves = {leaf: folder for leaf, folder in group.folders.items() if leaf != BACKBONE}
    for taken in dict.fromkeys(group.common.tokenizer or recipe.folders[recipe.tree.leaves[0]] for recipe, _ in work):
        for line in tokenizer_files.differences(taken, leaves):
            print(f"warning: {line}", flush=True)
    try:
        return lost | _make(work, group) if work else lost
    except UserError as error:
        return lost | {recipe.out: error for recipe, _ in work}


def _left_to_do(recipe: Recipe) -> Manifest | None:
    """The manifest that a result will have; None where it is done."""
    check_expected(recipe)
    planned = _plan_manifest(recipe)
    if (recipe.out / MANIFEST).exists():
        planned.parents = parents_of(recipe)
    return None if is_done(recipe.out, planned, recipe.overwrite) else planned


def _check_place(recipe: Recipe) -> None:
    """Refuse a folder that holds something else, as far as that can be seen without the parents' fingerprints."""
    planned, found = _plan_manifest(recipe), read_manifest(recipe.out)
    planned.parents = found.parents if found is not None else []
    is_done(recipe.out, planned, recipe.overwrite)


def _make(work: Sequence[tuple[Recipe, Manifest]], group: Group) -> dict[Path, UserError]:
    """Make all results of a group in one pass, then publish them; returns why some were given up."""
    began = time.perf_counter()
    readers = dict(group.common.models)
    origin = readers.pop(BACKBONE, None)
    with ExitStack() as publishing:
        known = origin
        if known is None and any(recipe.anatomy for recipe, _ in work):
            known = publishing.enter_context(anatomy.opened(work[0][0].origin, readers[work[0][0].tree.leaves[0]]))
        results = []
        with ExitStack() as writing:
            for recipe, planned in work:
                closing = [stack.enter_context(ExitStack()) for stack in (writing, publishing)]
                folder = closing[1].enter_context(publish(recipe.out, planned))
                infos = infos_of(readers[recipe.tree.leaves[0]])
                _check_room(recipe, folder, infos, len(work))
                writer = closing[0].enter_context(Writer(folder, infos, recipe.max_shard_bytes))
                results.append(_Result(recipe, planned, folder, writer, closing))
                if recipe.anatomy:
                    results[-1].anatomy = Anatomy(recipe.tree.leaves, known)
            _pass(results, readers, origin)
        group.check_unchanged()
        whole = [result for result in results if result.lost is None]
        for result in whole:
            result.planned.parents = parents_of(result.recipe)
            _finish(result, group.common, time.perf_counter() - began)
    for result in whole:
        recipe = result.recipe
        said = f"{recipe.operator_name} {parameters_of(recipe.operator)}"
        print(f"{recipe.out}: merged {recipe.tree.nested()} by {said}", *result.said, sep="\n  ", flush=True)
    return {result.recipe.out: result.lost for result in results if result.lost is not None}


def _pass(results: Sequence[_Result], readers: dict[str, Source], origin: Source | None) -> None:
    """Walk over the tensors once: read each from every model, merge it for every recipe, hand it to the writers."""
    sources = [*readers.values(), *([origin] if origin is not None else [])]
    sources += {result.anatomy.base for result in results if result.anatomy and result.anatomy.base} - {origin}
    infos = results[0].writer.tensors
    names = list(infos)
    total = sum(infos[name].nbytes for name in names) * (len(sources) + len(results))
    title = f"merge {results[0].recipe.name}" if len(results) == 1 else f"merge {len(results)} recipes"
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=not results[0].recipe.progress)
    with bar:
        underway: deque[tuple[str, Callable[[], Iterable[_Merged | UserError]]]] = deque()
        ahead = 0

        def hand_over(left: int) -> None:
            """Give merged tensors to the writers, in order, until so many bytes are underway."""
            nonlocal ahead
            while underway and (ahead > left or not left):
                name, made = underway.popleft()
                ahead -= infos[name].nbytes * len(results)
                for result, merged in zip(results, made(), strict=True):
                    result.take(name, merged)
                for source in sources:
                    source.release(name)
                bar.set_postfix_str(f"{names.index(name) + 1}/{len(names)} tensors", refresh=False)
                bar.update(infos[name].nbytes * (len(sources) + len(results)))

        for name, following in zip(names, [*names[1:], None], strict=True):
            if all(result.lost for result in results):
                return
            if following is not None:
                for source in sources:
                    source.prefetch(following)
            ahead += infos[name].nbytes * len(results)
            merge = partial(_merge_tensor, name, results, readers, origin)
            if infos[name].nbytes > SIDE_BY_SIDE:
                underway.append((name, merge))
                hand_over(0)  # makes the next result when the last one is with its writer
            else:
                underway.append((name, workers.begin(partial(_listed, merge)).result))
                hand_over(AHEAD)
        hand_over(0)


def _listed(made: Callable[[], Iterable[_Merged | UserError]]) -> list[_Merged | UserError]:
    return list(made())


def _merge_tensor(
    name: str, results: Sequence[_Result], readers: dict[str, Source], origin: Source | None
) -> Iterator[_Merged | UserError]:
    """Of each recipe, one after the other."""
    info = results[0].writer.tensors[name]
    if not is_floating(info.dtype):
        yield from [_Merged(_the_same_in_all(readers, name).copy())] * len(results)
        return

    device = results[0].recipe.device

    def placed(array: Array) -> Weights:
        return array if device == "cpu" else as_tensor(array).to(device)

    base = None
    if origin is not None:
        check_finite(origin.read(name), name, origin.folder)
        base = placed(origin.read(name))
    fold = TensorFold(
        name,
        lambda leaf: placed(readers[leaf].read(name)),
        base,
        lambda leaf, _: check_finite(readers[leaf].read(name), name, readers[leaf].folder),
    )
    for result in results:
        yield _merge_for(result, fold, readers)


def _merge_for(result: _Result, fold: TensorFold, readers: dict[str, Source]) -> _Merged | UserError:
    """A tensor of one result; the mistake where this result alone cannot have it."""
    if result.lost is not None:
        return result.lost
    recipe, info, facts = result.recipe, result.writer.tensors[fold.name], Facts()
    made = as_array(fold.merge(recipe.tree, recipe.operator_for(fold.name), facts))
    merged = converted(made, info.dtype)
    leaves = [readers[leaf].read(fold.name) for leaf in recipe.tree.leaves]
    left = leaves[0]
    change = _change(recipe, made, merged, left, facts)
    # The norm tells of NaN and infinity; large finite differences overflow it, too, so look again.
    if not math.isfinite(change["update_norm"]) and has_special(merged):
        return UserError(
            f"{recipe.out}: the merged {fold.name} as {info.dtype} holds NaN or infinity; choose milder parameters"
        )
    counts = result.anatomy.compare(fold.name, merged, leaves) if result.anatomy is not None else None
    if shares_memory(merged, leaves):  # an operator may give back what it got, which is not to stay mapped
        merged = merged.copy()
    entry = {"tensor": fold.name, "shape": list(info.shape), **change, "nodes": facts}
    return _Merged(merged, round(change["changed"] * left.size), entry, counts)


def _change(recipe: Recipe, made: Array, merged: Array, left: Array, facts: Facts) -> dict[str, float]:
    """How far the result is from the tree's first leaf; the root may have told, if that is its Left.

    Args:
        made: the result before it was rounded to its dtype, which the root knows nothing of
    """
    same_dtype = made.dtype == merged.dtype == left.dtype
    if recipe.tree.children[0].leaf and same_dtype and recipe.operator.selects:
        root = facts[recipe.tree.name()]
        return {key: root[key] for key in ("changed", "update_norm", "left_norm")}
    return changes(merged, left).facts


def _finish(result: _Result, common: compatibility.Common, seconds: float) -> None:
    """What stands beside the weights."""
    recipe, planned, folder = result.recipe, result.planned, result.folder
    elements = sum(math.prod(info.shape) for info in result.writer.tensors.values())
    planned.weights_sha256 = fingerprint(result.writer.sha256)
    planned.merge |= {
        "tensors": len(result.writer.tensors),
        "elements": elements,
        f"share_differing_from_{recipe.tree.leaves[0]}": result.differing / max(elements, 1),
        "seconds": round(seconds, 2),
    }
    first = recipe.folders[recipe.tree.leaves[0]]
    tokenizer = common.tokenizer or first
    write_config(first, tokenizer, common.rows, folder)
    if "tokenizer.json" not in copy_tokenizer(tokenizer, folder):
        print(f"warning: {tokenizer} has no tokenizer.json, so neither has the merged model", flush=True)
    # These files were not opened with the weights.
    if tokenizer_files.fingerprint_of(recipe) != planned.work["tokenizer"]:
        raise UserError(
            f"{tokenizer}: its tokenizer, chat template or config was changed while it was merged; run the same"
            " command again"
        )
    write_rows(folder / TABLE, result.table)
    told = anatomy_report.write(recipe, result.table, result.anatomy, folder)
    result.said = told.lines
    card.write(recipe, planned, folder, told)
    recipe_file.write(recipe, planned, folder)


def _check_room(recipe: Recipe, folder: Path, infos: dict[str, TensorInfo], results: int) -> None:
    total = results * sum(info.nbytes for info in infos.values())
    free = shutil.disk_usage(folder).free
    if free < total:
        what = "the merged model takes" if results == 1 else f"{results} merged models take"
        raise UserError(f"{recipe.out.parent}: {what} {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")


def _the_same_in_all(readers: dict[str, Source], name: str) -> Array:
    """A tensor of integers cannot be merged, only taken over where all models agree."""
    (first, tensor), *others = ((leaf, reader.read(name)) for leaf, reader in readers.items())
    for leaf, other in others:
        if not np.array_equal(tensor, other):
            raise UserError(f"{first} and {leaf} cannot be merged: the integers of {name} differ")
    return tensor


def _plan_manifest(recipe: Recipe) -> Manifest:
    parameters = parameters_of(recipe.operator)
    rules = [rule.entry() for rule in recipe.rules]
    # Which parent stands where is told by the parents' order; leaf names are only names.
    work = {"operator": recipe.operator_name, "parameters": parameters, "rules": rules,
            "tree": _shape(recipe.tree.nested()), "max_shard_bytes": recipe.max_shard_bytes}  # fmt: skip
    work["tokenizer"] = tokenizer_files.fingerprint_of(recipe)
    if "seed" in parameters:  # what is drawn depends on the leaves' names, see `fold`
        work["leaves"] = list(recipe.tree.leaves)
    if recipe.vocab != "same":  # results from before there was a choice stay what they are
        work["vocab"] = recipe.vocab
    facts = {"operator": recipe.operator_name, "parameters": parameters, "rules": rules, "tree": recipe.tree.nested(),
             "vocab": recipe.vocab, "device": recipe.device}  # fmt: skip
    return Manifest("merged", recipe.name, recipe.config, work, merge=facts)


def _shape(tree: object) -> object:
    """A tree with its leaves numbered from left to right."""
    counter = count()

    def number(node: object) -> object:
        return [number(child) for child in node] if isinstance(node, list) else next(counter)

    return number(tree)
