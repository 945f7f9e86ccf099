"""The manifest of a merged model before it is made: what identifies the work, and whether it is done already."""

from itertools import count

from branchmerge.merge import tokenizer_files
from branchmerge.merge.operators import parameters_of
from branchmerge.merge.parents import check_expected, parents_of
from branchmerge.merge.recipe import Recipe
from branchmerge.study import MANIFEST, Manifest, is_done, read_manifest


def left_to_do(recipe: Recipe) -> Manifest | None:
    """The manifest that the result will have; None if it is done already."""
    check_expected(recipe)
    manifest = planned(recipe)
    if (recipe.out / MANIFEST).exists():
        manifest.parents = parents_of(recipe)
    return None if is_done(recipe.out, manifest, recipe.overwrite) else manifest


def check_place(recipe: Recipe) -> None:
    """Refuse a folder that holds another result, as far as that shows without the parents' fingerprints."""
    manifest, found = planned(recipe), read_manifest(recipe.out)
    manifest.parents = found.parents if found is not None else []
    is_done(recipe.out, manifest, recipe.overwrite)


def planned(recipe: Recipe) -> Manifest:
    """The manifest as far as it is known before the merge; without parents."""
    parameters = parameters_of(recipe.operator)
    rules = [rule.entry() for rule in recipe.rules]
    # Leaves are identified by the order of the parents; their names do not matter, unless something is drawn by them.
    work = {"operator": recipe.operator_name, "parameters": parameters, "rules": rules,
            "tree": _shape(recipe.tree.nested()), "max_shard_bytes": recipe.max_shard_bytes}  # fmt: skip
    work["tokenizer"] = tokenizer_files.fingerprint_of(recipe)
    if "seed" in parameters:  # draws depend on the leaves' names, see fold.py
        work["leaves"] = list(recipe.tree.leaves)
    if recipe.vocab != "same":  # so results from before this setting existed keep their identity
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
