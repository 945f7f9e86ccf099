"""Choose the trajectories to train on, and account for every row that is dropped."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from branchmerge.trajectories.schema import Message, Trajectory
from branchmerge.trajectories.verification import CORRECT, UNVERIFIED, verify


@dataclass
class Selection:
    """Kept rows and the counts of the others by reason: `read` = len(`rows`) + the sum of `dropped`."""

    rows: list[Trajectory]
    read: int
    dropped: dict[str, int] = field(default_factory=dict)


Said = tuple[tuple[Message, ...], str]
"""Prompt and response of a row"""


def select(rows: Sequence[Trajectory], check: bool, progress: bool, taken: set[Said] | None = None) -> Selection:
    """Drop rows without a response, repeated ones (same prompt, same response) and, if `check`, wrong ones.

    Args:
        progress: show a bar, if this is a terminal
        taken: rows kept of earlier sources, which are dropped as copies here; the rows kept are added to it
    """
    dropped: Counter[str] = Counter()
    answered = [row for row in rows if row.response.strip()]
    dropped["empty"] = len(rows) - len(answered)
    taken = set() if taken is None else taken
    distinct = [row for row in _distinct(answered) if (row.prompt, row.response) not in taken]
    dropped["duplicate"] = len(answered) - len(distinct)
    kept: list[Trajectory] = []
    verdicts = verify(distinct) if check else (UNVERIFIED for _ in distinct)
    hidden = None if progress else True  # None: hidden unless this is a terminal
    bar = tqdm(zip(distinct, verdicts, strict=True), total=len(distinct), desc="verify", disable=hidden)
    for row, verdict in bar:
        if verdict in (CORRECT, UNVERIFIED):
            kept.append(row)
            taken.add((row.prompt, row.response))
        else:
            dropped[verdict] += 1
    return Selection(kept, len(rows), {reason: n for reason, n in sorted(dropped.items()) if n})


def _distinct(rows: Sequence[Trajectory]) -> list[Trajectory]:
    """The rows without copies; of several copies the last one that has a reference is kept, else the last one."""
    last: dict[Said, Trajectory] = {}
    for row in rows:
        key = (row.prompt, row.response)
        if row.reference is not None or key not in last or last[key].reference is None:
            last[key] = row
    return list(last.values())
