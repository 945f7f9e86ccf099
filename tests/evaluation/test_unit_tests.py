"""Programs whose tests are Python statements."""

import time

import pytest

from branchmerge.evaluation.sandbox import CRASHED, FAILED, PASSED, TIMEOUT, run_tests

DOUBLE = "def double(x):\n    return 2 * x\n"
HARMLESS = ["assert True"]


def test_right_program_passes() -> None:
    assert run_tests(DOUBLE, ["assert double(2) == 4", "assert double('a') == 'aa'"]) == PASSED


def test_program_with_tests_is_run_as_main() -> None:
    program = "import math, collections\nif __name__ == '__main__':\n    x = math.factorial(5)\n"
    assert run_tests(program, ["assert x == 120"]) == PASSED


def test_tests_share_a_namespace() -> None:
    assert run_tests("", ["x = 1", "x += 1", "assert x == 2"]) == PASSED


@pytest.mark.parametrize("test", ["assert double(2) == 5", "assert triple(2) == 6", "double()", "assert (", "1 / 0"])
def test_one_failing_test_fails_all(test: str) -> None:
    assert run_tests(DOUBLE, ["assert double(2) == 4", test, "assert double(3) == 6"]) == FAILED


@pytest.mark.parametrize("program", ["def f(:", "1 / 0", "import no_such_module", "raise KeyboardInterrupt", "input()"])
def test_program_that_raises_crashes(program: str) -> None:
    assert run_tests(program, HARMLESS) == CRASHED


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
        "print('passed')\nraise SystemExit",
        "import os\nos.write(1, b'passed')\nos._exit(0)",
        "import os\nfor fd in range(10):\n    try:\n        os.write(fd, b'passed')\n"
        "    except OSError:\n        pass\nos._exit(0)",
    ],
)
def test_leaving_before_the_tests_does_not_pass(program: str) -> None:
    assert run_tests(program, ["assert False"]) == CRASHED


def test_printing_passed_does_not_pass() -> None:
    assert run_tests("print('passed', flush=True)", ["assert False"]) == FAILED


@pytest.mark.parametrize("test", ["raise SystemExit", "raise SystemExit(0)", "quit_early()"])
def test_leaving_inside_a_test_does_not_pass(test: str) -> None:
    program = "import os\ndef quit_early():\n    os._exit(0)\n"
    assert run_tests(program, [test, "assert True"]) == CRASHED


def test_printing_does_not_disturb_the_verdict() -> None:
    assert run_tests("print('x' * 2_000_000)", ["print('more')", "assert True"]) == PASSED


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("while True:\n    pass", "assert True"),
        ("import time\ntime.sleep(60)", "assert True"),
        ("def f():\n    while True:\n        pass", "f()"),
    ],
)
def test_endless_tests_are_stopped(program: str, test: str) -> None:
    begin = time.monotonic()
    assert run_tests(program, [test], seconds=0.5) == TIMEOUT
    assert 0.5 <= time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("program", "test", "outcome"),
    [("x = bytearray(3 << 30)", "assert True", CRASHED), ("", "x = bytearray(3 << 30)", FAILED)],
)
def test_three_gigabytes_are_refused_in_tests(program: str, test: str, outcome: str) -> None:
    assert run_tests(program, [test]) == outcome


def test_large_file_is_refused() -> None:
    assert run_tests("open('x', 'wb').write(bytes(20 << 20))", HARMLESS) == CRASHED


def test_program_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match="without tests"):
        run_tests(DOUBLE, [])
