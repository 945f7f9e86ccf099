import tempfile
import time
from pathlib import Path

import psutil
import pytest

from branchmerge.evaluation.sandbox import CRASHED, FAILED, PASSED, TIMEOUT, run_tests

DOUBLE = "def double(x):\n    return 2 * x\n"
HARMLESS = ["assert True"]


def gone(pid: int) -> bool:
    """Whether a process is dead; a killed one that nobody has waited for yet is."""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_right_program_passes() -> None:
    assert run_tests(DOUBLE, ["assert double(2) == 4", "assert double('a') == 'aa'"]) == PASSED


def test_program_is_run_as_main_and_may_import_the_standard_library() -> None:
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
def test_endless_program_is_stopped_at_the_limit(program: str, test: str) -> None:
    begin = time.monotonic()
    assert run_tests(program, [test], seconds=0.5) == TIMEOUT
    assert 0.5 <= time.monotonic() - begin < 2.5


@pytest.mark.parametrize(
    ("program", "test", "outcome"),
    [("x = bytearray(3 << 30)", "assert True", CRASHED), ("", "x = bytearray(3 << 30)", FAILED)],
)
def test_three_gigabytes_are_refused(program: str, test: str, outcome: str) -> None:
    assert run_tests(program, [test]) == outcome


def test_memory_limit_is_what_it_says() -> None:
    program = "x = bytearray(300 << 20)"
    assert run_tests(program, HARMLESS, memory_bytes=1 << 30) == PASSED
    assert run_tests(program, HARMLESS, memory_bytes=256 << 20) == CRASHED


def test_large_file_is_refused() -> None:
    assert run_tests("open('x', 'wb').write(bytes(2 << 20))", HARMLESS) == CRASHED


@pytest.mark.parametrize("then", ["", "time.sleep(60)", "os._exit(1)", "raise ValueError"])
def test_child_process_of_a_program_is_dead_afterwards(tmp_path: Path, then: str) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import os, subprocess, time\nchild = subprocess.Popen(['sleep', '60'])\n"
        f"with open({str(pid_file)!r}, 'w') as file:\n    file.write(str(child.pid))\n{then}\n"
    )
    run_tests(program, HARMLESS, seconds=1.5)
    assert gone(int(pid_file.read_text()))


def test_forked_process_of_a_program_is_dead_afterwards(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(60)\n    os._exit(0)\n"
        f"with open({str(pid_file)!r}, 'w') as file:\n    file.write(str(pid))\n"
    )
    run_tests(program, HARMLESS, seconds=1)
    assert gone(int(pid_file.read_text()))


def test_environment_of_the_parent_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRANCHMERGE_TEST_SECRET", "hunter2")
    tests = ["assert 'BRANCHMERGE_TEST_SECRET' not in os.environ", "assert 'hunter2' not in str(os.environ)"]
    assert run_tests("import os", tests) == PASSED


def test_program_works_in_an_empty_folder_that_is_removed(tmp_path: Path) -> None:
    said = tmp_path / "cwd"
    program = f"import os\nopen('left', 'w').write('x')\nopen({str(said)!r}, 'w').write(os.getcwd())"
    assert run_tests(program, ["assert os.listdir() == ['left']"]) == PASSED
    folder = Path(said.read_text())
    assert folder.parent == Path(tempfile.gettempdir()).resolve()
    assert not folder.exists()
    assert folder != Path.cwd()


def test_packages_of_the_parent_are_out_of_reach() -> None:
    assert run_tests("import branchmerge", HARMLESS) == CRASHED


def test_program_without_tests_is_refused() -> None:
    with pytest.raises(ValueError, match="without tests"):
        run_tests(DOUBLE, [])


def test_no_file_descriptors_are_left_open() -> None:
    descriptors = Path("/proc/self/fd")
    run_tests("", HARMLESS)
    before = len(list(descriptors.iterdir()))
    for program in ("", "1 / 0"):
        run_tests(program, HARMLESS)
    assert len(list(descriptors.iterdir())) == before
