"""The models that are merged, named by the fingerprints of their weights."""

from branchmerge import fingerprints
from branchmerge.errors import UserError
from branchmerge.merge.recipe import Recipe
from branchmerge.study import Parent


def parents_of(recipe: Recipe) -> list[Parent]:
    """The recipe's leaves from left to right, then the backbone if it is used; waits for their fingerprints."""
    folders = [recipe.folders[leaf] for leaf in recipe.tree.leaves]
    return [fingerprints.of(folder) for folder in [*folders, *([recipe.base] if recipe.base else [])]]


def check_expected(recipe: Recipe) -> None:
    """Refuse parents whose weights are not those that the recipe names."""
    for folder, expected in recipe.expected.items():
        found = fingerprints.of(folder).weights_sha256
        if found != expected:
            raise UserError(
                f"{folder}: its weights have the SHA-256 {found[:12]}..., the recipe was made with"
                f" {expected[:12]}...; give it the folder of that model"
            )
