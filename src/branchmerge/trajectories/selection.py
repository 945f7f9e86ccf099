"""Choose the trajectories to train on, and account for every row that is dropped."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from branchmerge.trajectories.schema import Message, Trajectory
from branchmerge.trajectories.verification import CORRECT, UNVERIFIED, verify


@dataclass
class Selection:
    """Kept rows and the count of the others: `read` = `kept` + the sum of `dropped`."""

    rows: list[Trajectory]
    read: int
    dropped: dict[str, int] = field(default_factory=dict)


Said = tuple[tuple[Message, ...], str]
"""Prompt and response of a row"""


def select(rows: Sequence[Trajectory], check: bool, progress: bool, taken: set[Said] | None = None) -> Selection:
    """Drop rows without a response, repeated ones (same prompt, same response) and, if `check`, wrong ones.

    Args:
        progress: a bar, in a terminal
        taken: what was kept of other sources before, and may not be again; what is kept is added
    """
    dropped: Counter[str] = Counter()
    answered = [row for row in rows if row.response.strip()]
    dropped["empty"] = len(rows) - len(answered)
    taken = set() if taken is None else taken
    last: dict[Said, Trajectory] = {}
    for row in answered:
        said = (row.prompt, row.response)
        if said in taken:
            continue
        if row.reference is not None or said not in last or last[said].reference is None:  # a copy hides no reference
            last[said] = row
    distinct = list(last.values())
    dropped["duplicate"] = len(answered) - len(distinct)
    kept: list[Trajectory] = []
    verdicts = verify(distinct) if check else (UNVERIFIED for _ in distinct)
    hidden = None if progress else True  # None: as long as this is no terminal
    bar = tqdm(zip(distinct, verdicts, strict=True), total=len(distinct), desc="verify", disable=hidden)
    for row, verdict in bar:
        if verdict in (CORRECT, UNVERIFIED):
            kept.append(row)
            taken.add((row.prompt, row.response))
        else:
            dropped[verdict] += 1
    return Selection(kept, len(rows), {reason: n for reason, n in sorted(dropped.items()) if n})
