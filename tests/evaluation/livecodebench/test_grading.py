"""Verdicts on programs: which case, why, and what is refused; see test_official_parity for right and wrong."""

import json
import keyword
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.evaluation.livecodebench import grading
from branchmerge.evaluation.livecodebench.cases import Case
from branchmerge.evaluation.livecodebench.grading import (
    MEMORY_BYTES,
    OUTPUT_BYTES,
    CodeVerdict,
    decode,
    grade_program,
    parse,
    same_text,
)
from branchmerge.evaluation.livecodebench.harness import PREAMBLE, encode
from branchmerge.evaluation.livecodebench.preamble import preamble
from branchmerge.evaluation.sandbox import Job, Outcome, shared

ADD = "a, b = map(int, input().split())\nprint(a + b)\n"
MODES = pytest.mark.parametrize("mode", ["strict", "official"])


def stdin(*pairs: tuple[str, str]) -> list[Case]:
    return [Case(given, output, "stdin") for given, output in pairs]


def calls(*pairs: tuple[str, str]) -> list[Case]:
    return [Case(given, output, "functional") for given, output in pairs]


@MODES
def test_first_failing_case_is_named(mode: str) -> None:
    said = grade_program(ADD, stdin(("1 2", "3"), ("1 3", "5"), ("x", "1")), mode=mode)
    assert (said.correct, said.reason, said.case) == (False, "wrong_answer", 1)
    assert "'4" in said.detail and "'5'" in said.detail
    assert grade_program(ADD, stdin(("1 2", "3"), ("1 3", "4")), mode=mode) == CodeVerdict(True)


@MODES
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print(1", "crashed"),
        ("1 / 0", "crashed"),
        ("import os\nos._exit(3)", "crashed"),
        ("print(2)", "wrong_answer"),
        ("", "crashed|wrong_answer"),
    ],
)
def test_reasons_of_a_program(program: str, reason: str, mode: str) -> None:
    assert grade_program(program, stdin(("", "1")), mode=mode).reason in reason.split("|")


def test_limits_have_reasons_of_their_own() -> None:
    cases = stdin(("", "1"))
    assert grade_program(f"x = bytearray({MEMORY_BYTES})", cases).reason == "memory"
    assert grade_program(f"print('x' * {OUTPUT_BYTES + 1})", cases).reason == "output"
    assert grade_program("import ctypes\nctypes.string_at(0)", cases).reason == "crashed"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1", "no_function"),
        ("class Solution:\n    pass", "no_function"),
        ("def f(a):\n    return a + 1", "wrong_answer"),
        ("def f(a):\n    return object()", "wrong_answer"),
        ("def f(a):\n    raise ValueError('seen')", "crashed"),
        ("def f(a):\n    exit(0)", "crashed"),
        ("import os\ndef f(a):\n    os.write(3, b'x')\n    return a", "crashed|"),
    ],
)
def test_reasons_of_a_function(program: str, reason: str) -> None:
    assert grade_program(program, calls(("1", "1")), "f").reason in reason.split("|")


@MODES
def test_numpy_can_be_imported(mode: str) -> None:
    program = "import numpy as np\na = np.array(input().split(), dtype=int)\nprint(a.sum())"
    assert grade_program(program, stdin(("1 2", "3")), mode=mode) == CodeVerdict(True)
    assert grade_program(program, stdin(("1 2", "4")), mode=mode).reason == "wrong_answer"
    program = "import os, numpy\nprint(os.getcwd is None)"
    assert grade_program(program, stdin(("", str(mode == "official"))), mode=mode) == CodeVerdict(True)


def test_official_mode_gives_every_case_its_time_and_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """All run in one job, whose limits are for all of them together."""
    jobs: list[Job] = []

    class Watched:
        def run(self, job: Job) -> Outcome:
            jobs.append(job)
            return shared().run(job)

    monkeypatch.setattr(grading, "shared", Watched)
    long = "x" * (10 << 20)
    for number in (1, 3):
        cases = stdin(*[("", long)] * number)
        assert grade_program(f"print('x' * {len(long)})", cases, mode="official") == CodeVerdict(True)
    one, three = jobs
    assert one.seconds > 6 and three.seconds - one.seconds >= 2 * 6
    assert (one.output_bytes, three.output_bytes) == (OUTPUT_BYTES, 3 * OUTPUT_BYTES)


@MODES
@pytest.mark.parametrize(
    ("value", "equal", "other"),
    [
        ("np.array(a).sum()", "3", "4"),
        ("np.array(a).sum() > 2", "true", "false"),
        ("list(2 * np.array(a))", "[2, 4]", "[2, 5]"),
        ("[[x] for x in np.array(a)]", "[[1], [2]]", "[[1], [1]]"),
        ("np.array(7)", "7", "8"),
        ("np.float32(0.5)", "0.5", "0.25"),
    ],
)
def test_single_values_of_numpy_are_numbers(value: str, equal: str, other: str, mode: str) -> None:
    program = f"import numpy as np\ndef f(a):\n    return {value}"
    assert grade_program(program, calls(("[1, 2]", equal)), "f", mode) == CodeVerdict(True)
    assert grade_program(program, calls(("[1, 2]", other)), "f", mode).reason == "wrong_answer"


@pytest.mark.parametrize("value", ["np.array([3])", "np.datetime64(3, 's')", "pretender()"])
def test_other_values_of_numpy_equal_no_number(value: str) -> None:
    pretending = "class pretender:\n    ndim = 0\n    def item(self):\n        return pretender()\n"
    pretending += "    def __eq__(self, other):\n        return True\npretender.__module__ = 'numpy'\n"
    program = f"import numpy as np\n{pretending}def f(a):\n    return {value}"
    assert grade_program(program, calls(("1", "3")), "f").reason == "wrong_answer"


def test_error_is_shown() -> None:
    assert "ValueError: seen" in grade_program("raise ValueError('seen')", stdin(("", "1"))).detail
    assert "seen" in grade_program("raise ValueError('seen')", stdin(("", "1")), mode="official").detail


@pytest.mark.parametrize("workers", [1, 3])
def test_verdict_is_that_of_the_first_failing_case_however_many_run_at_once(workers: int) -> None:
    program = "import time\nn = int(input())\ntime.sleep(0.6 if n == 2 else 0)\nassert n != 3\nprint(min(n, 1))"
    cases = stdin(("0", "0"), ("1", "1"), ("2", "2"), ("3", "3"), ("4", "4"))
    said = grade_program(program, cases, workers=workers)
    assert (said.reason, said.case) == ("wrong_answer", 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_cases_after_a_failure_are_not_run(workers: int) -> None:
    program = "import time\nif input() == 'first':\n    print('wrong')\nelse:\n    time.sleep(1.5)"
    begin = time.monotonic()
    assert grade_program(program, stdin(("first", ""), *[("later", "")] * 30), workers=workers).case == 0
    assert time.monotonic() - begin < 20  # all would take 45 s, or half of it by two


def test_each_case_has_a_process_of_its_own() -> None:
    program = "seen = []\ndef f(a):\n    seen.append(a)\n    return len(seen)"
    cases = calls(("5", "1"), ("6", "1"))
    assert grade_program(program, cases, "f").correct
    assert not grade_program(program, cases, "f", "official").correct


def test_case_cannot_reach_the_verdict_of_a_later_one() -> None:
    program = """
import builtins, os, sys
if input() == 'attack':
    frame = sys._getframe()
    while frame:
        frame.f_globals.update(dict.fromkeys(['_wait', '_run', '_is_alone', '_set_stage'], lambda *_: (0, 0)))
        frame = frame.f_back
    for number in range(3, 256):
        try:
            os.write(number, bytes(13))
        except OSError:
            pass
    for pid in (os.getppid(), 1, -1):
        try:
            os.kill(pid, 9)
        except OSError:
            pass
    open('left', 'w').write('right')
    builtins.left = 'right'
    print('attacked')
else:
    print(open('left').read() if os.path.exists('left') else getattr(builtins, 'left', 'wrong'))
"""
    cases = stdin(("attack", "attacked"), *[("look", "wrong")] * 4)
    assert grade_program(program, cases) == CodeVerdict(True)
    said = grade_program(program, stdin(("attack", "attacked"), ("look", "right")))
    assert (said.reason, said.case) == ("wrong_answer", 1)


@MODES
def test_what_cannot_be_graded_is_an_error(mode: str) -> None:
    with pytest.raises(ValueError, match="without tests"):
        grade_program(ADD, [], mode=mode)
    with pytest.raises(ValueError, match="without a function must all be stdin"):
        grade_program(ADD, calls(("1", "1")), mode=mode)
    with pytest.raises(ValueError, match="with a function must all be functional"):
        grade_program(ADD, stdin(("1", "1")), "f", mode)
    for broken in (("{", "1"), ("1", "{"), ("1", "")):
        with pytest.raises(ValueError, match="case 1 is not JSON"):
            grade_program(ADD, calls(("1", "1"), broken), "f", mode)
    with pytest.raises(ValueError, match="not lenient"):
        grade_program(ADD, stdin(("1", "1")), mode="lenient")


@MODES
def test_expected_output_does_not_reach_the_process(mode: str) -> None:
    secret = "91827364550"
    program = "import gc, sys\ndef f(a):\n    found = repr([sys._getframe().f_back.f_locals, sys._getframe().f_back."
    program += (
        "f_globals, [o for o in gc.get_objects() if isinstance(o, (dict, list))]])\n    return '9182' + '73' in found"
    )
    said = grade_program(program, calls(("1", secret)), "f", mode)
    assert said.reason == "wrong_answer" and "False" in said.detail


lines = st.lists(st.text(st.characters(blacklist_characters="\n"), max_size=8), max_size=4)


@given(lines, st.sampled_from(["", " ", "\t", "\r"]))
def test_space_around_lines_does_not_count(text: list[str], space: str) -> None:
    said, expected = "\n".join(f"{space}{line}{space}" for line in text), "\n".join(text)
    assert same_text(said, expected)
    assert same_text(f"\n{said}\n\n", expected)
    assert not same_text(f"{said}\nmore", expected)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_texts_are_compared_the_same_both_ways(one: str, other: str) -> None:
    assert same_text(one, other) == same_text(other, one)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(values, st.booleans())
def test_json_values_survive_the_way_to_the_grader(value: object, official: bool) -> None:
    assert decode(parse(json.dumps(encode(value, official))), official) == parse(json.dumps(value))


def test_long_integers_do_not_need_a_higher_limit_here() -> None:
    assert sys.get_int_max_str_digits() == 4300
    digits = "7" * 6000
    assert grade_program(f"def f(a):\n    return int('{digits}')", calls(("1", digits)), "f").correct
    assert not grade_program(f"def f(a):\n    return int('{digits}') + 1", calls(("1", digits)), "f").correct


@pytest.mark.parametrize("answer", ['{"anything": true}', '{"ratio": [1, 0]}', '{"pairs": [[[], 1]]}', '{"x": 1}'])
def test_forged_values_are_refused(answer: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, ZeroDivisionError)):
        decode(json.loads(answer))


def test_names_that_a_program_uses_are_those_of_the_whole_preamble() -> None:
    """For every name of it, the object is the same one."""
    whole: dict[str, object] = {}
    exec(PREAMBLE, whole)
    names = [name for name in whole if not name.startswith("__") and not keyword.iskeyword(name)]
    assert {"gcd", "pow", "deque", "List", "heappush", "datetime", "sys"} <= set(names)
    part: dict[str, object] = {}
    exec(preamble(" ".join(names)), part)
    assert {name: part[name] for name in names} == {name: whole[name] for name in names}
    little: dict[str, object] = {}
    exec(preamble("print(gcd(1, 2), True)  # 'lcm'"), little)
    assert {"gcd", "lcm", "print"} <= little.keys() and "deque" not in little
