import dataclasses

import pytest

from branchmerge.errors import UserError
from branchmerge.trajectories.schema import Message, Reference, Trajectory
from branchmerge.trajectories.selection import select
from branchmerge.trajectories.verification import CORRECT, UNVERIFIED, verify


def trajectory(number: int, response: str, reference: Reference | None = None) -> Trajectory:
    messages = (Message("user", f"question {number}"), Message("assistant", response))
    return Trajectory(f"row-{number}", "math", messages, reference)


MATH = Reference("math", answer="84")
CODE = Reference("code", tests=("assert f() == 1",))
RIGHT = trajectory(0, "\\boxed{84}", MATH)
WRONG = trajectory(1, "\\boxed{85}", MATH)
WITHOUT_ANSWER = trajectory(2, "<think>\nhm", MATH)
UNREFERENCED = trajectory(3, "anything")
RIGHT_CODE = trajectory(4, "```python\ndef f():\n    return 1\n```", CODE)
WRONG_CODE = trajectory(5, "```python\ndef f():\n    return 2\n```", CODE)
CRASHING_CODE = trajectory(6, "```python\nraise ValueError\n```", CODE)
RIGHT_CHOICE = trajectory(7, "\\boxed{B}", Reference("choice", answer="B"))
ROWS = [RIGHT, WRONG, WITHOUT_ANSWER, RIGHT, UNREFERENCED, RIGHT_CODE, WRONG_CODE, WRONG, CRASHING_CODE, RIGHT_CHOICE]


def test_verify_answers_row_by_row_in_order() -> None:
    rows = [RIGHT_CODE, WRONG, UNREFERENCED, WRONG_CODE, RIGHT, CRASHING_CODE, WITHOUT_ANSWER]
    assert list(verify(rows)) == [
        CORRECT, "wrong_answer", UNVERIFIED, "failed_test", CORRECT, "crashed", "no_answer",
    ]  # fmt: skip


def test_a_reference_that_cannot_be_read_is_named() -> None:
    damaged = trajectory(8, "```python\nprint(1)\n```", Reference("livecodebench", public="[]", private="eJx"))
    with pytest.raises(UserError, match=r"row-8: its reference cannot be used \(the private tests .*mend or drop"):
        list(verify([RIGHT, damaged]))


@pytest.mark.parametrize("check", [True, False])
def test_rows_without_a_response_are_dropped(check: bool) -> None:
    selection = select([RIGHT, trajectory(9, " \n")], check=check, progress=False)
    assert selection.rows == [RIGHT] and selection.dropped == {"empty": 1}


def test_wrong_and_repeated_rows_are_dropped_and_counted_by_reason() -> None:
    selection = select(ROWS, check=True, progress=False)
    assert selection.rows == [RIGHT, UNREFERENCED, RIGHT_CODE, RIGHT_CHOICE]
    assert selection.dropped == {"crashed": 1, "duplicate": 2, "failed_test": 1, "no_answer": 1, "wrong_answer": 1}


@pytest.mark.parametrize("check", [True, False])
def test_every_row_read_is_kept_or_counted(check: bool) -> None:
    selection = select(ROWS, check=check, progress=False)
    assert selection.read == len(ROWS) == len(selection.rows) + sum(selection.dropped.values())


def test_rows_without_reference_are_kept_and_counted() -> None:
    selection = select([UNREFERENCED, RIGHT], check=True, progress=False)
    assert (selection.rows, selection.dropped) == ([UNREFERENCED, RIGHT], {})


def test_without_check_wrong_rows_stay_and_all_count_as_unverified() -> None:
    selection = select([RIGHT, WRONG, RIGHT], check=False, progress=False)
    assert (selection.rows, selection.dropped) == ([RIGHT, WRONG], {"duplicate": 1})


def test_two_responses_to_one_question_are_no_duplicates() -> None:
    other = dataclasses.replace(RIGHT, messages=(RIGHT.messages[0], Message("assistant", "So \\boxed{84}.")))
    assert select([RIGHT, other], check=True, progress=False).rows == [RIGHT, other]


def test_same_response_after_another_system_prompt_is_no_duplicate() -> None:
    other = dataclasses.replace(RIGHT, messages=(Message("system", "Be brief."), *RIGHT.messages))
    assert select([RIGHT, other], check=True, progress=False).rows == [RIGHT, other]


def test_a_repeated_row_under_another_id_is_a_duplicate() -> None:
    selection = select([RIGHT, dataclasses.replace(RIGHT, id="copy")], check=True, progress=False)
    assert (len(selection.rows), selection.dropped) == (1, {"duplicate": 1})


@pytest.mark.parametrize("first", ["graded", "copy"])
def test_a_copy_without_reference_does_not_save_a_wrong_row(first: str) -> None:
    rows = sorted([WRONG, dataclasses.replace(WRONG, reference=None)], key=lambda row: row.reference is None)
    selection = select(rows if first == "graded" else rows[::-1], check=True, progress=False)
    assert (selection.rows, selection.dropped) == ([], {"duplicate": 1, "wrong_answer": 1})
