"""math-verify behind a deadline: right verdicts from many threads, and hanging or killed workers are replaced."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from branchmerge.evaluation import math_worker
from branchmerge.evaluation.graders import GRADER_TIMEOUT, grade
from branchmerge.evaluation.math_worker import LONGEST, MathPool, math_equal
from branchmerge.trajectories.schema import Reference

TOWER = "9^{9^{9^{9}}}"
"""Has more digits than there are atoms; working it out never ends."""


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    pool = MathPool(size=2, seconds=20)
    yield pool
    pool.close()


@pytest.fixture
def hasty() -> Iterator[MathPool]:
    pool = MathPool(size=2, seconds=4)
    yield pool
    pool.close()


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("204", "204.0", True),
        ("\\frac{1}{2}", "0.5", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("204", "205", False),
        ("(1,2)", "(2,1)", False),
        ("50\\%", "50", True),
        ("50", "50\\%", True),
        ("50\\%", "50%", True),
        ("50\\%", "50\\%", True),
        ("90", "90°", True),
        ("90°", "90^\\circ", True),
        ("90", "90^\\degree", True),
        ("5", "5.", True),
        ("50", "50\\%.", True),
        ("\\sqrt{2}", "\\sqrt{2}.", True),
        ("1.5", "1.5.", True),
        ("50\\%", "0.5", False),
        ("50\\%", "5", False),
        ("90", "90°-5°", False),
        ("5", "5%6", False),
        ("5", "5!.", False),
        ("1.2", "1,2.", False),
        ("50", "50\\% off", False),
        ("50", "1/50\\%", False),
        ("50", "50\\\\60\\%", False),
        ("50", "\\%", False),
        ("\\text{June 20}", "20.", False),
        ("\\text{A.}", "\\text{B.}", False),
        ("84", "", False),
        ("", "84", False),
        ("84", "\ud800", False),  # no character at all, but a tokenizer may make it
        ("84", "84\n84}{", False),
    ],
)
def test_equal_as_mathematics(pool: MathPool, gold: str, answer: str, equal: bool) -> None:
    assert pool.equal(gold, answer) is equal


def test_the_shared_pool_compares_too() -> None:
    assert math_equal("\\frac{1}{2}", "1/2") is True
    assert math_equal("\\frac{1}{2}", "1/3") is False


def test_a_worker_serves_one_request_after_the_other(pool: MathPool) -> None:
    assert pool.equal("1", "1")
    first = pool.workers()
    assert [pool.equal("1", str(n)) for n in range(5)] == [False, True, False, False, False]
    assert pool.workers() == first


def test_many_threads_get_their_own_answers(pool: MathPool) -> None:
    with ThreadPoolExecutor(8) as threads:
        equal = list(threads.map(lambda n: pool.equal(str(n // 2), f"{n}/2"), range(60)))
    assert equal == [n % 2 == 0 for n in range(60)]
    assert len(pool.workers()) <= 2


def test_a_hanging_comparison_is_killed_at_its_deadline_and_the_next_one_works(hasty: MathPool) -> None:
    assert hasty.equal("1", "1")
    (pid,) = hasty.workers()
    began = time.monotonic()
    assert hasty.equal("1", TOWER) is None
    assert 4 <= time.monotonic() - began < 60
    assert not running(pid)
    assert hasty.equal("2", "2") is True
    assert hasty.workers() != [pid]


def test_hanging_comparisons_do_not_hold_up_other_threads(hasty: MathPool) -> None:
    with ThreadPoolExecutor(4) as threads:
        answers = [TOWER, "7", TOWER, "8"]
        assert list(threads.map(lambda answer: hasty.equal("7", answer), answers)) == [None, True, None, False]


def test_idle_workers_that_were_killed_are_replaced() -> None:
    pool = MathPool(size=2, seconds=60)
    assert pool.equal("1", "1")
    (first,) = pool.workers()
    os.kill(first, signal.SIGSTOP)  # so that the next request needs a second worker
    with ThreadPoolExecutor(1) as thread:
        comparison = thread.submit(pool.equal, "2", "2")
        while pool.workers():
            time.sleep(0.01)
        assert pool.equal("3", "3") is True
        os.kill(first, signal.SIGCONT)
        assert comparison.result() is True
    both = pool.workers()
    assert len(both) == 2
    for pid in both:
        os.kill(pid, signal.SIGKILL)
    assert [pool.equal("3", str(n)) for n in (3, 4)] == [True, False]
    pool.close()


def test_a_worker_killed_at_work_is_replaced_and_the_comparison_done_again() -> None:
    pool = MathPool(size=1, seconds=60)
    assert pool.equal("1", "1")
    (pid,) = pool.workers()
    os.kill(pid, signal.SIGSTOP)  # so that it is sure to be at work when it is killed
    with ThreadPoolExecutor(1) as thread:
        comparison = thread.submit(pool.equal, "3", "3")
        while pool.workers():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert comparison.result() is True
    assert pool.workers() != [pid]
    pool.close()


def test_memory_is_limited() -> None:
    pool = MathPool(size=1, seconds=60, memory_bytes=512 << 20)
    assert pool.equal("3", "3") is True
    (pid,) = pool.workers()
    assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == 512 << 20
    assert pool.equal("3", "2^{2^{36}}") is not True  # eight gigabytes
    assert pool.equal("3", "3") is True
    pool.close()


def test_an_endless_expression_is_compared_as_text(pool: MathPool) -> None:
    long = "1+" * LONGEST + "1"
    assert pool.equal("1", long) is False
    assert pool.equal(long, long) is True


def test_a_worker_that_cannot_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "math_verify.py"
    broken.write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="did not start"):
        MathPool(size=1).equal("1", "1")


def test_workers_end_with_the_process_that_started_them() -> None:
    code = (
        "from branchmerge.evaluation import math_worker as m; assert m.math_equal('1', '1');"
        "print(m._pool().workers()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not running(int(done.stdout))


def test_a_forked_process_gets_workers_of_its_own() -> None:
    assert math_equal("1", "1")
    mine = math_worker._pool().workers()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            other = math_equal("5", "5") is True and set(math_worker._pool().workers()).isdisjoint(mine)
            math_worker._pool().close()
            status = 0 if other else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert math_equal("6", "6") is True


def test_a_timeout_is_a_wrong_answer_with_its_own_reason(hasty: MathPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_worker, "_pool", lambda: hasty)
    verdict = grade(f"\\boxed{{{TOWER}}}", Reference("math", answer="7"))
    assert (verdict.correct, verdict.reason, verdict.answer) == (False, GRADER_TIMEOUT, TOWER)
