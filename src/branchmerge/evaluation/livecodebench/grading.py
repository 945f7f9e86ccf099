"""Grade a program on a problem's test cases: run it in the sandbox, compare its output here with the expected one.

`strict`, the default, asks what a judge asks: a fresh process per case, real standard input and output, 6 s, 4 GiB.
`official` gives LiveCodeBench's verdicts, its faults included, to compare with published numbers; where the two differ,
`benchmarks/grading_probes.py` has a probe. Expected outputs never reach the process that runs the solution, so in
`strict` no trick makes a wrong answer pass.

Source: lcb_runner/evaluation/testing_util.py of LiveCodeBench (28fef95) for what counts as equal.
"""

import json
import marshal
import reprlib
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from branchmerge.evaluation.livecodebench.cases import Case
from branchmerge.evaluation.livecodebench.preamble import preamble
from branchmerge.evaluation.sandbox import Job, Outcome, shared

SECONDS = 6
"""Seconds for one case, including the start of its process; LiveCodeBench's limit."""
MEMORY_BYTES = 4 << 30
OUTPUT_BYTES = 16 << 20
STRICT, OFFICIAL = "strict", "official"

WRONG_ANSWER = "wrong_answer"
"""It ended normally with another output, or returned something that is not a JSON value."""
TIMEOUT, MEMORY, OUTPUT = "timeout", "memory", "output"
"""It broke that limit."""
CRASHED = "crashed"
"""An uncaught exception (a syntax error too), an exit code other than 0, a signal, or an exit before the result."""
NO_FUNCTION = "no_function"
"""The solution has neither a class Solution with the method nor a function of that name."""
REASONS = (WRONG_ANSWER, TIMEOUT, MEMORY, OUTPUT, CRASHED, NO_FUNCTION)
_BROKEN = {"error": CRASHED, "killed": CRASHED, "timeout": TIMEOUT, "memory": MEMORY, "output": OUTPUT}
_UNREADABLE = (ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError)
"""Errors that decoding and comparing a worker's answer may raise, as it may write anything."""

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxlevel = 30
_SHORT.maxstring = 150


@dataclass(frozen=True)
class CodeVerdict:
    correct: bool
    reason: str = ""
    """One of REASONS; empty if correct."""
    case: int | None = None
    """The first case that failed, from 0; None if correct, or if no case was reached (official)."""
    detail: str = ""
    """The output and the expected one, or the end of the error; for a reader, cut to some hundred characters."""


def grade_program(
    program: str, cases: Sequence[Case], function: str = "", mode: str = STRICT, workers: int = 1
) -> CodeVerdict:
    """Run a solution on the cases in order, up to the first that fails.

    Args:
        function: what `functional` cases call (`func_name` of the problem's metadata); empty for `stdin` cases
        mode: strict or official
        workers: cases that run side by side (strict); the verdict is that of the first failing one in any case

    Raises:
        ValueError: there are no cases, they are of another kind than `function` says or not JSON, or no such mode
    """
    if not cases:
        raise ValueError("a problem without tests can neither pass nor fail a program")
    kind = "functional" if function else "stdin"
    if any(case.kind != kind for case in cases):
        raise ValueError(f"the cases of a problem {'with' if function else 'without'} a function must all be {kind}")
    if mode not in (STRICT, OFFICIAL):
        raise ValueError(f"mode is {STRICT} or {OFFICIAL}, not {mode}")
    expected = [_expected(case, number) if function else case.output for number, case in enumerate(cases)]
    if mode == OFFICIAL:
        return _officially(program, cases, expected, function)
    for number, verdict in enumerate(_verdicts(program, cases, expected, function, workers)):
        if not verdict.correct:
            return CodeVerdict(False, verdict.reason, number, verdict.detail)
    return CodeVerdict(True)


def _expected(case: Case, number: int) -> Any:
    try:
        _arguments(case)
        return parse(case.output)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"case {number} is not JSON ({error})") from error


def _arguments(case: Case) -> list[str]:
    lines = [line for line in case.input.split("\n") if line.strip()]
    for line in lines:
        parse(line)
    return lines


def _verdicts(
    program: str, cases: Sequence[Case], expected: Sequence[Any], function: str, workers: int
) -> Iterator[CodeVerdict]:
    """The verdict of each case, in order. Later cases run in parallel; those not begun are dropped at the end."""
    imports = preamble(program)
    # The solution's names are those of the module __main__ itself, as if it were run alone.
    code = f"{imports}exec(compile({program!a}, 'solution.py', 'exec', 0, True))\n"
    task = {"preamble": imports, "solution": program, "function": function}

    def grade(number: int) -> CodeVerdict:
        if function:
            return _grade_call({**task, "arguments": _arguments(cases[number])}, expected[number])
        return _grade_output(code, cases[number].input, expected[number])

    if workers == 1:
        yield from map(grade, range(len(cases)))
        return
    pool = ThreadPoolExecutor(workers)
    try:
        ahead: deque[Future[CodeVerdict]] = deque()
        for number in range(len(cases)):
            ahead.append(pool.submit(grade, number))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _grade_output(code: str, given: str, expected: str) -> CodeVerdict:
    outcome = shared().run(Job(code, given, SECONDS, MEMORY_BYTES, OUTPUT_BYTES))
    if outcome.status != "ok":
        return _broken(outcome)
    said = outcome.stdout.decode(errors="replace")
    if same_text(said, expected):
        return CodeVerdict(True)
    return _wrong(said, expected)


def _grade_call(task: dict[str, Any], expected: Any) -> CodeVerdict:
    token, function = secrets.token_hex(16), task["function"]
    code = f"{_harness('harness')}call_function()\n"
    given = json.dumps({**task, "token": token})
    outcome = shared().run(Job(code, given, SECONDS, MEMORY_BYTES, OUTPUT_BYTES))
    if outcome.status != "ok":
        return _broken(outcome)
    try:
        answer = _answer(outcome, token)
        if "no_function" in answer:
            return CodeVerdict(False, NO_FUNCTION, None, f"there is no Solution.{function} and no {function}")
        value = decode(answer["value"])
        return CodeVerdict(True) if value == expected else _wrong(value, expected)
    except _NoAnswerError:
        return CodeVerdict(False, CRASHED, None, "it ended, or wrote to a file that is not its own, before it returned")
    except _UNREADABLE as error:
        return CodeVerdict(False, WRONG_ANSWER, None, f"what it returned cannot be read ({type(error).__name__})")


def _officially(program: str, cases: Sequence[Case], expected: Sequence[Any], function: str) -> CodeVerdict:
    """All cases in one process, as LiveCodeBench runs them; unlike there, with our limit on memory."""
    token = secrets.token_hex(16)
    inputs = [case.input for case in cases]
    task = {"solution": program, "function": function, "inputs": inputs, "seconds": SECONDS, "token": token}
    code = f"{_harness('harness')}{_harness('official_harness')}run_officially()\n"
    seconds = (SECONDS + 1) * len(cases) + 5
    outcome = shared().run(Job(code, json.dumps(task), seconds, MEMORY_BYTES, OUTPUT_BYTES * len(cases)))
    if outcome.status != "ok":
        return _broken(outcome)
    try:
        answer = _answer(outcome, token)
        for number, (found, wanted) in enumerate(zip(answer["results"], expected, strict=False)):
            value = decode(found, official=True) if function else str(found)
            if not (value == wanted if function else same_text(value, wanted)):
                return CodeVerdict(False, WRONG_ANSWER, number, _wrong(value, wanted).detail)
        reached, said = len(answer["results"]), str(answer["error"])[:300]
    except _NoAnswerError:
        return CodeVerdict(False, CRASHED, None, "it ended before the result")
    except _UNREADABLE as error:
        return CodeVerdict(False, WRONG_ANSWER, None, f"what it returned cannot be read ({type(error).__name__})")
    if reached == len(cases):
        return CodeVerdict(True)
    return CodeVerdict(False, TIMEOUT if "timeoutexception" in said.lower() else CRASHED, reached, said)


@cache
def _harness(name: str) -> str:
    return _compiled(Path(__file__).with_name(f"{name}.py").read_text())


@cache
def _compiled(text: str) -> str:
    """A harness as a program that contains its bytecode, since compiling it would take as long as a small case.

    The sandbox runs the interpreter that runs this.
    """
    code = compile(text, "grader.py", "exec", dont_inherit=True, optimize=2)
    return f"exec(__import__('marshal').loads({marshal.dumps(code)!r}))\n"


class _NoAnswerError(Exception):
    """The worker ended without an answer after its token."""


def _answer(outcome: Outcome, token: str) -> dict[str, Any]:
    if not outcome.stdout.startswith(token.encode()):
        raise _NoAnswerError
    answer = parse(outcome.stdout[len(token) :].decode())  # refuses a second answer after the first
    if not isinstance(answer, dict):
        raise TypeError("no object")
    return answer


def _broken(outcome: Outcome) -> CodeVerdict:
    return CodeVerdict(False, _BROKEN[outcome.status], None, outcome.stderr.strip()[-300:])


def _wrong(said: Any, expected: Any) -> CodeVerdict:
    texts = [value if isinstance(value, str) else _shown(value) for value in (said, expected)]
    short = [text if len(text) <= 150 else f"{text[:75]} ... {text[-75:]}" for text in texts]
    return CodeVerdict(False, WRONG_ANSWER, None, f"said {short[0]!r}, expected {short[1]!r}")


def _shown(value: Any) -> str:
    try:
        return _SHORT.repr(value)
    except _UNREADABLE:  # too deep, or an integer too long
        return f"a {type(value).__name__}"


def same_text(said: str, expected: str) -> bool:
    """Whether two texts are equal line by line, ignoring surrounding space: as text, or token by token as numbers."""
    lines = [[line.strip() for line in text.strip().split("\n")] for text in (said, expected)]
    return len(lines[0]) == len(lines[1]) and all(map(_same_line, *lines))


def _same_line(said: str, expected: str) -> bool:
    if said == expected:
        return True
    try:
        return [Decimal(token) for token in said.split()] == [Decimal(token) for token in expected.split()]
    except (InvalidOperation, ValueError):  # no number; a signalling NaN
        return False


def parse(text: str) -> Any:
    """JSON, integers of any length included: Python reads at most 4300 digits as int, and Decimal any number."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 4300 else Decimal(digits))


def decode(value: Any, official: bool = False) -> Any:
    """The result that `harness.encode` encoded, as a value to compare with parsed JSON.

    Raises:
        ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError: no harness wrote this
    """
    if isinstance(value, list):
        return [decode(item, official) for item in value]
    if not isinstance(value, dict):
        return value
    if "pairs" in value:
        return {decode(key, official): decode(item, official) for key, item in value["pairs"]}
    if "ratio" in value:
        return Fraction(*value["ratio"])
    if "anything" in value and official:
        return _Anything()
    return _Nothing(value["other"])


class _Anything:
    """Stands for an object that claims to equal everything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class _Nothing:
    """Stands for an object that equals no JSON value."""

    kind: str
