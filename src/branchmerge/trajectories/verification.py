"""Grade what the teacher wrote with the same graders that will grade the student."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from branchmerge.evaluation.graders import grade
from branchmerge.trajectories.schema import Trajectory

UNVERIFIED = "unverified"
CORRECT = "correct"


def verify(rows: Sequence[Trajectory]) -> Iterator[str]:
    """Yield for each row, in order: correct, unverified (no reference), or why it is wrong.

    Code runs in subprocesses, as many side by side as there are cores; the rest is graded in this thread, because
    math-verify guards its parser with a signal, which only the main thread may use.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        running = {
            number: pool.submit(grade, row.response, row.reference)
            for number, row in enumerate(rows)
            if row.reference is not None and row.reference.grader == "code"
        }
        for number, row in enumerate(rows):
            if row.reference is None:
                yield UNVERIFIED
                continue
            verdict = running[number].result() if number in running else grade(row.response, row.reference)
            yield CORRECT if verdict.correct else verdict.reason
