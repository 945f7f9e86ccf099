"""Grade the teacher's responses with the graders that will grade the student."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from branchmerge.errors import UserError
from branchmerge.evaluation.graders import grade
from branchmerge.machine import cores
from branchmerge.trajectories.schema import Trajectory

UNVERIFIED = "unverified"
CORRECT = "correct"


def verify(rows: Sequence[Trajectory]) -> Iterator[str]:
    """Yield for each row, in order: correct, unverified (no reference), or why it is wrong.

    One thread per core: programs and math-verify run in processes of their own.
    """
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        yield from pool.map(_reason, rows)


def _reason(row: Trajectory) -> str:
    if row.reference is None:
        return UNVERIFIED
    try:
        verdict = grade(row.response, row.reference)
    except ValueError as error:  # damaged packed tests
        raise UserError(f"{row.id}: its reference cannot be used ({error}); mend or drop that row") from error
    return CORRECT if verdict.correct else verdict.reason
