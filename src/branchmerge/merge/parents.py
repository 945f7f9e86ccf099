"""Fingerprints of the models that are merged."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from branchmerge.errors import UserError
from branchmerge.merge.recipe import Recipe
from branchmerge.study import Parent, parent_of


class Parents:
    """Fingerprints of the parents' weights, taken by threads while the merge goes on."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._pool = ThreadPoolExecutor(max(len(folders), 1), "fingerprint")
        self._found: dict[Path, Future[Parent]] = {folder: self._pool.submit(parent_of, folder) for folder in folders}

    def of(self, recipe: Recipe) -> list[Parent]:
        """Those of a recipe's leaves from left to right, then the backbone's."""
        folders = [recipe.folders[leaf] for leaf in recipe.tree.leaves]
        return [self._found[folder].result() for folder in [*folders, *([recipe.base] if recipe.base else [])]]

    def check(self, recipe: Recipe) -> None:
        """Refuse parents that are not those which the recipe was written for."""
        for folder, expected in recipe.expected.items():
            found = self._found[folder].result().weights_sha256
            if found != expected:
                raise UserError(
                    f"{folder}: its weights have the SHA-256 {found[:12]}..., the recipe was made with"
                    f" {expected[:12]}...; give it the folder of that model"
                )

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # an error need not wait for them
