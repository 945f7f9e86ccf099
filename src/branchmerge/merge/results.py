"""Results on their way to their folders: what was merged, who takes it, and the queue from the one to the other."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from branchmerge.errors import UserError
from branchmerge.merge.anatomy import Anatomy, Counts
from branchmerge.merge.arrays import Array
from branchmerge.merge.checkpoint import Writer
from branchmerge.merge.recipe import Recipe
from branchmerge.merge.views import Source
from branchmerge.study import Manifest


@dataclass
class Merged:
    """A tensor of a result, and what is reported about it; integer tensors are only copied."""

    tensor: Array
    changed: int = 0
    """Number of elements that differ from the first leaf's"""
    entry: dict[str, Any] | None = None
    """Its row in tensors.json"""
    counts: Counts | None = None
    """For the anatomy"""


@dataclass
class Result:
    """A recipe on its way to a folder."""

    recipe: Recipe
    planned: Manifest
    folder: Path
    writer: Writer
    closing: Sequence[ExitStack]
    """Stacks that close the writer, then publish or remove the folder"""
    table: list[dict[str, Any]] = field(default_factory=list)
    differing: int = 0
    anatomy: Anatomy | None = None
    lines: list[str] = field(default_factory=list)
    error: UserError | None = None
    """Why it cannot be made, while other results of the pass can"""

    def take(self, name: str, merged: Merged | UserError) -> None:
        """Hand the next tensor to the writer, and keep what is reported about it."""
        if self.error is not None:  # given up while this tensor was being merged
            return
        if isinstance(merged, UserError):
            self._give_up(merged)
            return
        self.writer.write(name, merged.tensor)
        self.differing += merged.changed
        if merged.entry is not None:
            numbers = self.anatomy.add(name, merged.counts) if self.anatomy and merged.counts else {}
            self.table.append(merged.entry | numbers)

    def _give_up(self, error: UserError) -> None:
        """Remove what was written at once, as the other results need the room."""
        self.error = error
        for stack in self.closing:
            stack.__exit__(type(error), error, None)


class Queue:
    """Tensors whose merge has begun, in the order in which the writers get them; and the progress bar."""

    def __init__(self, results: Sequence[Result], sources: Sequence[Source]) -> None:
        self._results = results
        self._sources = sources
        self._infos = results[0].writer.tensors
        self._names = list(self._infos)
        self._underway: deque[tuple[str, Callable[[], Iterable[Merged | UserError]]]] = deque()
        self._bytes = 0
        passes = len(sources) + len(results)
        total = sum(info.nbytes for info in self._infos.values()) * passes
        title = f"merge {results[0].recipe.name}" if len(results) == 1 else f"merge {len(results)} recipes"
        hidden = not results[0].recipe.progress
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=hidden)

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, name: str, made: Callable[[], Iterable[Merged | UserError]]) -> None:
        """Append a tensor; `made` gives what was merged of it, one for each result."""
        self._underway.append((name, made))
        self._bytes += self._infos[name].nbytes * len(self._results)

    def hand_over(self, left: int) -> None:
        """Give merged tensors to the writers, in order, until at most so many bytes are left; 0: all tensors."""
        while self._underway and (self._bytes > left or not left):
            name, made = self._underway.popleft()
            self._bytes -= self._infos[name].nbytes * len(self._results)
            for result, merged in zip(self._results, made(), strict=True):
                result.take(name, merged)
            for source in self._sources:
                source.release(name)
            self._bar.set_postfix_str(f"{self._names.index(name) + 1}/{len(self._names)} tensors", refresh=False)
            self._bar.update(self._infos[name].nbytes * (len(self._sources) + len(self._results)))
