"""Decide whether a response is right: integers and letters by text, mathematics by math-verify, programs by tests.

The same graders serve the benchmarks and the selection of trajectories. They may be called from any thread: math-verify
and programs run in processes of their own.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from branchmerge.evaluation import answers
from branchmerge.evaluation.livecodebench.cases import Case, cases
from branchmerge.evaluation.livecodebench.grading import OFFICIAL, STRICT, grade_program
from branchmerge.evaluation.math_worker import math_equal
from branchmerge.evaluation.programs import last_program, official_program
from branchmerge.evaluation.sandbox import PASSED, run_tests
from branchmerge.trajectories.schema import CHOICES, Reference

GRADING = 2
"""Version of the graders, raised whenever verdicts change: stored responses are then graded again."""
NO_ANSWER = "no_answer"
WRONG_ANSWER = "wrong_answer"
GRADER_TIMEOUT = "grader_timeout"
"""math-verify did not finish in time: counted as wrong."""
MATH_VERIFY = "math_verify"
SECONDARY = {"integer": (MATH_VERIFY,)}
"""Second opinions that a grader reports beside its verdict."""
RUNS_CODE = ("code", "livecodebench", "livecodebench_official")
"""Graders that run programs."""


@dataclass(frozen=True)
class Verdict:
    """correct; else the reason: no_answer, wrong_answer, grader_timeout, or what the program did (see `sandbox`)."""

    correct: bool
    reason: str = ""
    answer: str = ""
    """The text that was graded as the answer."""
    truncated: bool = False
    """Reasoning was opened and never closed; the reason is no_answer then."""
    secondary: dict[str, float] = field(default_factory=dict)
    """Second opinions by name, 1.0 for right: `math_verify` on the last box, of an integer."""

    @property
    def vote(self) -> str | bool | None:
        """Its vote in maj@k: all right answers are one vote, wrong ones are told apart by spelling; None for no
        answer."""
        if self.reason == NO_ANSWER:
            return None
        return True if self.correct else "".join(self.answer.split())


def votes(verdicts: Sequence[Verdict], grader: str) -> list[str | bool | None]:
    """The vote of each sample of a question in maj@k; mathematically equal answers vote alike, right or wrong."""
    found = [verdict.vote for verdict in verdicts]
    if grader != "math":
        return found
    spelt: dict[str | bool | None, str | bool | None] = {}
    known: list[str] = []
    for verdict, vote in zip(verdicts, found, strict=True):
        if vote in spelt:
            continue
        spelt[vote] = vote
        # One that kept math-verify busy until its deadline is compared with no other, as each would wait for it again.
        if not isinstance(vote, str) or verdict.reason != WRONG_ANSWER:
            continue
        common = _common(vote, verdict.answer, known)
        if common == vote:
            known.append(vote)
        elif common is not None:
            spelt[vote] = common
    return [spelt[vote] for vote in found]


def _common(vote: str, answer: str, known: Iterable[str]) -> str | None:
    """The known vote that equals the answer as mathematics, else its own; None if a comparison met its deadline.

    Each further one may take as long: 64 samples would have 2,016 comparisons, more than five hours of deadlines.
    """
    for one in known:
        equal = math_equal(one, answer)
        if equal or equal is None:
            return one if equal else None
    return vote


def grade(response: str, reference: Reference) -> Verdict:
    """Grade a whole response, reasoning included.

    Raises:
        ValueError: the tests of the reference cannot be read
        RuntimeError: math-verify cannot be started
    """
    answer = final_part(response)
    if answer is None:
        return Verdict(
            False, NO_ANSWER, truncated=True, secondary=dict.fromkeys(SECONDARY.get(reference.grader, ()), 0.0)
        )
    graders = {
        "math": grade_math, "choice": grade_choice, "integer": grade_integer, "code": grade_code,
        "livecodebench": grade_livecodebench, "livecodebench_official": grade_livecodebench,
    }  # fmt: skip
    return graders[reference.grader](answer, reference)


def final_part(response: str) -> str | None:
    """What follows the last </think>; the whole text if it has no tag; None if a <think> was never closed.

    Where the chat template opens the reasoning, the caller puts that <think> in front of the response.
    """
    answer = response.rpartition("</think>")[2]
    return None if "<think>" in answer else answer


def grade_math(answer: str, reference: Reference) -> Verdict:
    """Equal as mathematics, by math-verify; only the last box is looked at."""
    box = answers.last_box(answer)
    if not box:
        return Verdict(False, NO_ANSWER)
    equal = math_equal(reference.answer, box)
    return Verdict(bool(equal), GRADER_TIMEOUT if equal is None else "" if equal else WRONG_ANSWER, box)


def grade_integer(answer: str, reference: Reference) -> Verdict:
    """The integer in the last box or in the last statement; math-verify on the box gives its opinion beside it."""
    box = answers.last_box(answer)
    secondary = {MATH_VERIFY: float(bool(box) and bool(math_equal(reference.answer, box or "")))}
    number = answers.integer(answer)
    if number is None:
        return Verdict(False, WRONG_ANSWER if box else NO_ANSWER, box or "", secondary=secondary)
    correct = number == int(reference.answer)
    return Verdict(correct, "" if correct else WRONG_ANSWER, str(number), secondary=secondary)


def grade_choice(answer: str, reference: Reference) -> Verdict:
    """The letter in the last box or in the last statement."""
    letter = answers.letter(answer, CHOICES)
    if letter is None:
        return Verdict(False, NO_ANSWER)
    correct = letter == reference.answer
    return Verdict(correct, "" if correct else WRONG_ANSWER, letter)


def grade_code(answer: str, reference: Reference) -> Verdict:
    """The last fenced program, run against the reference's tests in a subprocess."""
    program = last_program(answer)
    if program is None:
        return Verdict(False, NO_ANSWER)
    outcome = run_tests(program, reference.tests)
    return Verdict(outcome == PASSED, "" if outcome == PASSED else outcome, program)


def grade_livecodebench(answer: str, reference: Reference) -> Verdict:
    """The last fenced program, run against all tests of its problem, public and private; see `grade_program`.

    The official mode extracts the program as LiveCodeBench does.
    """
    mode = OFFICIAL if reference.grader == "livecodebench_official" else STRICT
    program = official_program(answer) if mode == OFFICIAL else last_program(answer)
    if program is None:
        return Verdict(False, NO_ANSWER)
    with _UNPACKING:
        tests = _unpacked(reference.public, reference.private)
    verdict = grade_program(program, tests, reference.function, mode)
    return Verdict(verdict.correct, "" if verdict.correct else verdict.reason, program)


_UNPACKING = threading.Lock()


@lru_cache(maxsize=1)
def _unpacked(public: str, private: str) -> Sequence[Case]:
    """Unpacked tests of one problem, cached for its samples; of the last problem only, as they may take 100s of MB."""
    return cases(public, private)
