"""What the published protocols fix: prompts to the letter, limits, and which of two texts is the reference."""

import pytest

from branchmerge.evaluation.answers import integer, letter
from branchmerge.evaluation.graders import WRONG_ANSWER, Verdict, grade
from branchmerge.evaluation.livecodebench.cases import Case
from branchmerge.evaluation.livecodebench.grading import grade_program
from branchmerge.evaluation.prompts import choice_question, system_prompt
from branchmerge.trajectories.schema import Reference


def test_the_authors_choice_prompt_to_the_letter() -> None:
    """Their science_evaluation puts the instruction first, keeps its doubled braces, and lists choices by commas."""
    assert choice_question("Which?", ["w", "x", "y", "z"], "tinyr1") == (
        "Return your final response within \\boxed{{}} and only include the letter choice (A, B, C, or D) as your final"
        " response. Which?\nA) w, B) x, C) y, D) z"
    )
    assert system_prompt("gpqa_diamond", "tinyr1") == (
        "You are a helpful and harmless assistant. You should think step-by-step."
    )


def test_the_reference_is_math_verifys_gold() -> None:
    """math-verify is not symmetric: to a relation an interval is an answer, to an interval a relation is none."""
    assert grade("\\boxed{(1,2)}", Reference("math", answer="1<x<2")).correct
    assert not grade("\\boxed{1<x<2}", Reference("math", answer="(1,2)")).correct


@pytest.mark.parametrize(
    "text", ["The answer is {}.\nSo it is \\boxed{{{}", "The answer is {}, \\boxed{{1}} or \\boxed{{"]
)
def test_a_box_that_was_cut_off_is_no_answer(text: str) -> None:
    """What the box would have held is not known, so what was stated before does not count in its place."""
    assert integer(text.format(204, 20)) is None
    assert letter(text.format("B", "B")) is None


def test_a_livecodebench_case_has_six_seconds() -> None:
    """LiveCodeBench's own limit (its --timeout); the program sleeps for as many seconds as it reads."""
    program = "import time\ntime.sleep(float(input()))\nprint(1)\n"
    found = grade_program(program, [Case("4.5", "1", "stdin"), Case("8", "1", "stdin")], workers=2)
    assert (found.reason, found.case) == ("timeout", 1)


def test_spaces_do_not_split_a_vote() -> None:
    spelt = [Verdict(False, WRONG_ANSWER, answer).vote for answer in ("x + 1", "x+1", " x +1\n", "x + 2")]
    assert spelt[0] == spelt[1] == spelt[2] != spelt[3]
