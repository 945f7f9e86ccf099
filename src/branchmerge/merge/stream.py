"""Checkpoints in, checkpoint out: for every tensor, map it from each leaf, fold the tree, write it.

    parents (mapped files) --> fold of recipe 1 --> writer thread --> shards of result 1
                          \\-> fold of recipe 2 --> writer thread --> shards of result 2

Recipes over the same parents are made in one pass. One tensor of each model is in memory at a time.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from branchmerge import fingerprints
from branchmerge.errors import UserError
from branchmerge.files import write_rows
from branchmerge.machine import allow_open_files
from branchmerge.merge import anatomy, anatomy_report, card, compatibility, recipe_file, tokenizer_files
from branchmerge.merge.anatomy import Anatomy
from branchmerge.merge.arrays import Array, Weights, as_array, as_tensor, converted, is_floating, shares_memory
from branchmerge.merge.checkpoint import TensorInfo, Writer
from branchmerge.merge.fold import Facts, TensorFold
from branchmerge.merge.groups import BACKBONE, Group, check_apart, infos_of, opened, raise_failed
from branchmerge.merge.manifest import check_place, left_to_do
from branchmerge.merge.operators import parameters_of
from branchmerge.merge.parents import parents_of
from branchmerge.merge.recipe import Recipe
from branchmerge.merge.results import Merged, Queue, Result
from branchmerge.merge.scan import changes, check_finite, has_special
from branchmerge.merge.threads import keep_freed_memory, workers
from branchmerge.merge.views import Source
from branchmerge.merge.vocabulary import write_config
from branchmerge.student.export import copy_tokenizer
from branchmerge.study import Manifest, fingerprint, locked, publish

TABLE = "tensors.json"
SIDE_BY_SIDE = 1 << 25
"""Tensors of up to this many bytes are merged side by side, a thread each; all threads share a larger one."""
AHEAD = 1 << 27
"""Bytes of results that may be merged before the writers take them, to keep the threads busy while a disk is slow."""


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
        UserError: before the first merge begins, if models do not fit together or a place is taken; after the last, if
            some could not be made, such as those of a parent with NaN. It names these; the others are made.
    """
    keep_freed_memory()
    allow_open_files(2 * len(recipes))  # each has its lock and the shard that is being written
    outs = [recipe.out for recipe in recipes]
    check_apart(outs)
    failed: dict[Path, UserError] = {}
    with ExitStack() as stack:
        groups = opened(recipes, stack)
        for recipe in sorted(recipes, key=lambda recipe: recipe.out.resolve()):
            stack.enter_context(locked(recipe.out))
            check_place(recipe)
        for group in groups:
            failed |= _merge_group(group)
    if failed:
        raise_failed(failed, len(recipes))
    return outs


def _merge_group(group: Group) -> dict[Path, UserError]:
    """Make the results of a group; returns the error of each that could not be made."""
    for folder in group.folders.values():
        fingerprints.begin(folder)
    failed: dict[Path, UserError] = {}
    work = []
    for recipe in group.recipes:
        try:
            planned = left_to_do(recipe)
        except UserError as error:
            failed[recipe.out] = error
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
        return failed | _make(work, group) if work else failed
    except UserError as error:
        return failed | {recipe.out: error for recipe, _ in work}


def _make(work: Sequence[tuple[Recipe, Manifest]], group: Group) -> dict[Path, UserError]:
    """Make all results of a group in one pass, then publish them; returns the errors of those that were given up."""
    began = time.perf_counter()
    readers = dict(group.common.models)
    backbone = readers.pop(BACKBONE, None)
    with ExitStack() as publishing:
        compared = backbone  # for the anatomy, which may have a backbone that the operator does not need
        if compared is None and any(recipe.anatomy for recipe, _ in work):
            compared = publishing.enter_context(anatomy.opened(work[0][0].origin, readers[work[0][0].tree.leaves[0]]))
        results = []
        with ExitStack() as writing:
            for recipe, planned in work:
                closing = [stack.enter_context(ExitStack()) for stack in (writing, publishing)]
                folder = closing[1].enter_context(publish(recipe.out, planned))
                infos = infos_of(readers[recipe.tree.leaves[0]])
                _check_room(recipe, folder, infos, len(work))
                writer = closing[0].enter_context(Writer(folder, infos, recipe.max_shard_bytes))
                results.append(Result(recipe, planned, folder, writer, closing))
                if recipe.anatomy:
                    results[-1].anatomy = Anatomy(recipe.tree.leaves, compared)
            _pass(results, readers, backbone)
        group.check_unchanged()
        whole = [result for result in results if result.error is None]
        for result in whole:
            result.planned.parents = parents_of(result.recipe)
            _finish(result, group.common, time.perf_counter() - began)
    for result in whole:
        recipe = result.recipe
        said = f"{recipe.operator_name} {parameters_of(recipe.operator)}"
        print(f"{recipe.out}: merged {recipe.tree.nested()} by {said}", *result.lines, sep="\n  ", flush=True)
    return {result.recipe.out: result.error for result in results if result.error is not None}


def _pass(results: Sequence[Result], readers: dict[str, Source], backbone: Source | None) -> None:
    """Walk over the tensors once: read each from every model, merge it for every recipe, hand it to the writers."""
    sources = [*readers.values(), *([backbone] if backbone is not None else [])]
    sources += {result.anatomy.base for result in results if result.anatomy and result.anatomy.base} - {backbone}
    infos = results[0].writer.tensors
    names = list(infos)
    with Queue(results, sources) as queue:
        for name, following in zip(names, [*names[1:], None], strict=True):
            if all(result.error for result in results):
                return
            if following is not None:
                for source in sources:
                    source.prefetch(following)
            merge = partial(_merge_tensor, name, results, readers, backbone)
            if infos[name].nbytes > SIDE_BY_SIDE:
                queue.add(name, merge)
                queue.hand_over(0)  # merges for the next result while the writer has the last one's tensor
            else:
                queue.add(name, workers.begin(partial(_listed, merge)).result)
                queue.hand_over(AHEAD)
        queue.hand_over(0)


def _listed(made: Callable[[], Iterable[Merged | UserError]]) -> list[Merged | UserError]:
    return list(made())


def _merge_tensor(
    name: str, results: Sequence[Result], readers: dict[str, Source], backbone: Source | None
) -> Iterator[Merged | UserError]:
    """A tensor of each result, one after the other."""
    info = results[0].writer.tensors[name]
    if not is_floating(info.dtype):
        yield from [Merged(_the_same_in_all(readers, name).copy())] * len(results)
        return

    device = results[0].recipe.device

    def placed(array: Array) -> Weights:
        return array if device == "cpu" else as_tensor(array).to(device)

    base = None
    if backbone is not None:
        check_finite(backbone.read(name), name, backbone.folder)
        base = placed(backbone.read(name))
    fold = TensorFold(
        name,
        lambda leaf: placed(readers[leaf].read(name)),
        base,
        lambda leaf, _: check_finite(readers[leaf].read(name), name, readers[leaf].folder),
    )
    for result in results:
        yield _merge_for(result, fold, readers)


def _merge_for(result: Result, fold: TensorFold, readers: dict[str, Source]) -> Merged | UserError:
    """A tensor of one result; or the error, where this result alone cannot be made."""
    if result.error is not None:
        return result.error
    recipe, info, facts = result.recipe, result.writer.tensors[fold.name], Facts()
    made = as_array(fold.merge(recipe.tree, recipe.operator_for(fold.name), facts))
    merged = converted(made, info.dtype)
    leaves = [readers[leaf].read(fold.name) for leaf in recipe.tree.leaves]
    left = leaves[0]
    change = _change(recipe, made, merged, left, facts)
    # The norm is not finite where a value is not; large finite differences overflow it, too, so check the values.
    if not math.isfinite(change["update_norm"]) and has_special(merged):
        return UserError(
            f"{recipe.out}: the merged {fold.name} as {info.dtype} holds NaN or infinity; choose milder parameters"
        )
    counts = result.anatomy.compare(fold.name, merged, leaves) if result.anatomy is not None else None
    if shares_memory(merged, leaves):  # an operator may return its input, whose memory is released after this tensor
        merged = merged.copy()
    entry = {"tensor": fold.name, "shape": list(info.shape), **change, "nodes": facts}
    return Merged(merged, round(change["changed"] * left.size), entry, counts)


def _change(recipe: Recipe, made: Array, merged: Array, left: Array, facts: Facts) -> dict[str, float]:
    """How far the result is from the tree's first leaf.

    The root of the tree has measured it already if that leaf is its Left, and if its result was not rounded since.

    Args:
        made: the result as the root gave it, before it was rounded to its dtype
    """
    same_dtype = made.dtype == merged.dtype == left.dtype
    if recipe.tree.children[0].leaf and same_dtype and recipe.operator.selects:
        root = facts[recipe.tree.name()]
        return {key: root[key] for key in ("changed", "update_norm", "left_norm")}
    return changes(merged, left).facts


def _finish(result: Result, common: compatibility.Common, seconds: float) -> None:
    """Write the files beside the weights: config, tokenizer, table, anatomy, model card and recipe."""
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
    # The weights stayed open since the start; these files were only read now.
    if tokenizer_files.fingerprint_of(recipe) != planned.work["tokenizer"]:
        raise UserError(
            f"{tokenizer}: its tokenizer, chat template or config was changed while it was merged; run the same"
            " command again"
        )
    write_rows(folder / TABLE, result.table)
    text = anatomy_report.write(recipe, result.table, result.anatomy, folder)
    result.lines = text.lines
    card.write(recipe, planned, folder, text)
    recipe_file.write(recipe, planned, folder)


def _check_room(recipe: Recipe, folder: Path, infos: dict[str, TensorInfo], results: int) -> None:
    total = results * sum(info.nbytes for info in infos.values())
    free = shutil.disk_usage(folder).free
    if free < total:
        what = "the merged model takes" if results == 1 else f"{results} merged models take"
        raise UserError(f"{recipe.out.parent}: {what} {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left")


def _the_same_in_all(readers: dict[str, Source], name: str) -> Array:
    """A tensor of integers, which is not merged but copied; refused where the models differ."""
    (first, tensor), *others = ((leaf, reader.read(name)) for leaf, reader in readers.items())
    for leaf, other in others:
        if not np.array_equal(tensor, other):
            raise UserError(f"{first} and {leaf} cannot be merged: the integers of {name} differ")
    return tensor
