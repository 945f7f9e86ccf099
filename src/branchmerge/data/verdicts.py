"""What the graders said of a branch's rows: asked once, and the same for all processes and for a run that goes on.

A program close to its time limit may pass today and fail tomorrow, or on another core; rows that come and go with that
would give every process a training of its own, and a checkpoint another plan than the one that it was made under.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from branchmerge.student import ranks
from branchmerge.study import write_json
from branchmerge.trajectories.schema import Trajectory
from branchmerge.trajectories.verification import verify

PART = 256
"""Rows that the first process grades while the others wait for it, who would not wait for all of them."""


class Verdicts:
    """Callable as `verification.verify` is; all processes of a training call it together."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: where an earlier run kept them, and this one does."""
        self.path = path
        self._known: dict[str, str] = ranks.by_first(self._read)

    def __call__(self, rows: Sequence[Trajectory]) -> Iterator[str]:
        for start in range(0, len(rows), PART):
            part = rows[start : start + PART]
            new = [row for row in part if _key(row) not in self._known]
            verdicts = ranks.by_first(partial(_graded, new)) if new else []
            self._known |= {_key(row): verdict for row, verdict in zip(new, verdicts, strict=True)}
            yield from (self._known[_key(row)] for row in part)

    def keep(self) -> None:
        """For the run that goes on where this one is ended."""
        if self.path is not None and ranks.is_first():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self._known)

    def _read(self) -> dict[str, str]:
        if self.path is None or not self.path.is_file():
            return {}
        known: dict[str, str] = json.loads(self.path.read_text())
        return known


def _graded(rows: Sequence[Trajectory]) -> list[str]:
    return list(verify(rows))


def _key(row: Trajectory) -> str:
    """Of all that a grader looks at."""
    return hashlib.sha256(repr((row.prompt, row.response, row.reference)).encode(errors="surrogatepass")).hexdigest()
