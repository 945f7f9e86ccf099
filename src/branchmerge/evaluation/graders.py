"""Decide whether a response is right: math by math-verify, choices by their letter, code by running it.

The same graders serve the benchmarks and the selection of trajectories.
"""

import logging
import re
from dataclasses import dataclass

from branchmerge.evaluation.answers import last_box
from branchmerge.evaluation.sandbox import PASSED, run_tests
from branchmerge.trajectories.schema import Reference

# math-verify warns at every call about timeouts that its caller chose.
logging.getLogger("math_verify").setLevel(logging.ERROR)

NO_ANSWER = "no_answer"
WRONG_ANSWER = "wrong_answer"


@dataclass(frozen=True)
class Verdict:
    """correct; else the reason: no_answer, wrong_answer, or what happened to the code (see `sandbox`)."""

    correct: bool
    reason: str = ""
    answer: str = ""
    """What was taken for the answer."""


def grade(response: str, reference: Reference) -> Verdict:
    """Grade a whole response, reasoning included."""
    answer = final_part(response)
    if answer is None:
        return Verdict(False, NO_ANSWER)
    return {"math": grade_math, "choice": grade_choice, "code": grade_code}[reference.grader](answer, reference)


def final_part(response: str) -> str | None:
    """What follows the last </think>; the whole text if it has no tag; None if a <think> was never closed.

    Where the chat template opens the reasoning, the caller puts that <think> in front of the response.
    """
    answer = response.rpartition("</think>")[2]
    return None if "<think>" in answer else answer


def grade_math(answer: str, reference: Reference) -> Verdict:
    """Equal as mathematics, by math-verify; only the last box is looked at."""
    from math_verify import parse, verify

    box = last_box(answer)
    if not box:
        return Verdict(False, NO_ANSWER)
    gold, found = (parse(f"\\boxed{{{text}}}") for text in (reference.answer, box))
    correct = bool(gold) and bool(found) and bool(verify(gold, found))
    return Verdict(correct, "" if correct else WRONG_ANSWER, box)


def grade_choice(answer: str, reference: Reference) -> Verdict:
    """The letter in the last box."""
    box = re.fullmatch(r"(?:\\text\{)?\(?([A-J])\)?\.?\}?", last_box(answer) or "")
    if box is None:
        return Verdict(False, NO_ANSWER)
    letter = box.group(1)
    correct = letter == reference.answer
    return Verdict(correct, "" if correct else WRONG_ANSWER, letter)


def grade_code(answer: str, reference: Reference) -> Verdict:
    """The last fenced block of Python (or of no language), run against the reference's tests in a subprocess."""
    # Fences are paired from the top, so that the end of one block is never taken for the beginning of another.
    blocks = re.findall(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", answer, flags=re.DOTALL | re.MULTILINE)
    programs = [block for language, block in blocks if language.lower() in ("", "py", "python", "python3")]
    if not programs:
        return Verdict(False, NO_ANSWER)
    outcome = run_tests(programs[-1], reference.tests)
    return Verdict(outcome == PASSED, "" if outcome == PASSED else outcome, programs[-1])
