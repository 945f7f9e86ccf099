"""Grades that are asked once."""

import json
from pathlib import Path

from branchmerge.data.verdicts import PART, Verdicts
from branchmerge.trajectories.schema import Message, Reference, Trajectory


def answered(number: int, question: str = "What is 6 x 7?") -> Trajectory:
    """A row whose answer should be 42."""
    turns = (Message("user", question), Message("assistant", f"\\boxed{{{number}}}"))
    return Trajectory(question, "math", turns, Reference(grader="math", answer="42"))


def test_rows_are_graded_in_their_order_and_parts() -> None:
    rows = [answered(42 if i % 3 else i, f"Question {i}") for i in range(PART + 5)]
    expected = ["correct" if i % 3 or i == 42 else "wrong_answer" for i in range(PART + 5)]
    assert list(Verdicts()(rows)) == expected


def test_a_run_that_goes_on_believes_the_run_before(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "verdicts.json"
    first = Verdicts(path)
    assert list(first([answered(42)])) == ["correct"]
    first.keep()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(dict.fromkeys(kept, "failed_test")))
    again = Verdicts(path)
    assert list(again([answered(42), answered(41)])) == ["failed_test", "wrong_answer"]
