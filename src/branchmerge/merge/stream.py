"""Checkpoints in, checkpoint out: for every tensor, read it from each leaf, fold the tree, write it."""

import shutil
import time
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from branchmerge.errors import UserError
from branchmerge.merge import card, compatibility
from branchmerge.merge.checkpoint import Reader, Writer
from branchmerge.merge.operators import parameters_of
from branchmerge.merge.recipe import Recipe
from branchmerge.student.backbone import check_checkpoint
from branchmerge.student.export import copy_tokenizer
from branchmerge.study import Manifest, is_done, locked, parent_of, publish


def merge(recipe: Recipe) -> Path:
    """Make the merged checkpoint of a recipe; finished work is not done again.

    Returns:
        Its folder.

    Raises:
        UserError: the parents do not fit together, one holds NaN, or the disk is too small.
    """
    for folder in recipe.folders.values():
        check_checkpoint(folder)
    with ExitStack() as stack:
        readers = {leaf: stack.enter_context(Reader(folder)) for leaf, folder in recipe.folders.items()}
        base = stack.enter_context(Reader(recipe.base)) if recipe.base is not None else None
        compatibility.check({**readers, "the backbone": base} if base is not None else readers)
        planned = _plan_manifest(recipe)
        with locked(recipe.out):
            if is_done(recipe.out, planned, recipe.overwrite):
                print(f"{recipe.out}: done already", flush=True)
                return recipe.out
            with publish(recipe.out, planned) as partial:
                planned.merge |= _write(recipe, readers, base, partial)
                first = recipe.folders[recipe.tree.leaves[0]]
                shutil.copyfile(first / "config.json", partial / "config.json")
                if "tokenizer.json" not in copy_tokenizer(first, partial):
                    print(f"warning: {first} has no tokenizer.json, so neither has the merged model", flush=True)
                card.write(recipe, planned, partial)
    print(
        f"{recipe.out}: merged {recipe.tree.nested()} by {recipe.operator_name} {parameters_of(recipe.operator)}",
        flush=True,
    )
    return recipe.out


def _write(recipe: Recipe, readers: dict[str, Reader], base: Reader | None, out: Path) -> dict[str, object]:
    """Merge and write all tensors; returns the facts for the manifest."""
    first = readers[recipe.tree.leaves[0]]
    total = sum(info.nbytes for info in first.tensors.values())
    free = shutil.disk_usage(out).free
    if free < total:
        raise UserError(
            f"{out.parent}: the merged model takes {total / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left"
        )
    began = time.perf_counter()
    differing = elements = 0
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"merge {recipe.name}", disable=not recipe.progress)
    with bar, Writer(out, first.tensors, recipe.max_shard_bytes) as writer:
        for name, info in first.tensors.items():
            left = first.read(name)
            if info.dtype.is_floating_point:
                merged = _merge_tensor(recipe, readers, base, name).to(info.dtype)
                _check_finite(merged, out.parent, f"the merged {name} as {info.dtype}", "choose milder parameters")
            else:
                merged = _the_same_in_all(readers, name)
            writer.write(name, merged)
            differing += int((merged != left).sum())
            elements += left.numel()
            bar.update(info.nbytes)
    return {
        "tensors": len(first.tensors),
        "elements": elements,
        f"share_differing_from_{recipe.tree.leaves[0]}": differing / max(elements, 1),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _merge_tensor(recipe: Recipe, readers: dict[str, Reader], base: Reader | None, name: str) -> Tensor:
    """Fold the tree over one tensor; what lies between the steps stays in memory, in float32."""

    def read(reader: Reader) -> Tensor:
        tensor = reader.read(name).float()
        _check_finite(tensor, reader.folder, f"the tensor {name}", "that model is broken")
        return tensor

    origin = read(base) if base is not None else None
    return recipe.tree.fold(lambda leaf: read(readers[leaf]), lambda models: recipe.operator(models, origin))


def _check_finite(tensor: Tensor, folder: Path, what: str, remedy: str) -> None:
    if not torch.isfinite(tensor).all():
        raise UserError(f"{folder}: {what} holds NaN or infinity; {remedy}")


def _the_same_in_all(readers: dict[str, Reader], name: str) -> Tensor:
    """A tensor of integers cannot be merged, only taken over where all models agree."""
    (first, tensor), *others = ((leaf, reader.read(name)) for leaf, reader in readers.items())
    for leaf, other in others:
        if not torch.equal(tensor, other):
            raise UserError(f"{first} and {leaf} cannot be merged: the integers of {name} differ")
    return tensor


def _plan_manifest(recipe: Recipe) -> Manifest:
    folders = [recipe.folders[leaf] for leaf in recipe.tree.leaves]
    parameters = parameters_of(recipe.operator)
    # Which parent stands where is told by the parents' order; leaf names are only names.
    work = {"operator": recipe.operator_name, "parameters": parameters, "tree": _shape(recipe.tree.nested()),
            "max_shard_bytes": recipe.max_shard_bytes}  # fmt: skip
    parents = [parent_of(folder) for folder in [*folders, *([recipe.base] if recipe.base is not None else [])]]
    facts = {"operator": recipe.operator_name, "parameters": parameters, "tree": recipe.tree.nested()}
    return Manifest("merged", recipe.name, recipe.config, work, parents, merge=facts)


def _shape(tree: object) -> object:
    """A tree with its leaves numbered from left to right."""
    counter = count()

    def number(node: object) -> object:
        return [number(child) for child in node] if isinstance(node, list) else next(counter)

    return number(tree)
