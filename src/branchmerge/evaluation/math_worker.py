"""Equality of two mathematical expressions by math-verify, in worker processes that can be killed.

math-verify evaluates what a model wrote: a power tower keeps it busy for ever inside C code, where no signal handler
runs, or takes all memory. So it runs in a fresh interpreter with a limit on memory, and every request has a deadline:

    thread -> MathPool.equal(gold, answer) -> an idle worker, or a new one -> one line of JSON to its stdin
           <- True or False, its one byte of answer;  None: killed at the deadline, the next request gets a new worker

This file is both sides: run as a script, it is the worker, which imports nothing of this package.
"""

import atexit
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from functools import cache
from typing import Any

SECONDS = 10.0
"""Wall time of one comparison; usual ones take milliseconds."""
START_SECONDS = 120.0
"""Wall time for a worker to import math-verify; about a second on an idle machine."""
MEMORY_BYTES = 2 << 30
"""Address space of a worker."""
LONGEST = 5000
"""Characters of both expressions together: they then fit into a pipe's buffer, so that writing never waits."""

SIGN = re.compile(r"(?:\\?%|\^?\{?°\}?|\^?\\degree|\s|\.)+$")
"""A sign behind a number, which math-verify reads in running mathematics but not in a box: 50\\%, 90°, a full stop."""

READY, EQUAL, OTHER = b"r", b"1", b"0"


class WorkerDiedError(Exception):
    """The worker ended without an answer."""


class MathWorker:
    """One worker process; used by one thread at a time."""

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        # -P: the script's folder stays out of sys.path, where this package's modules would hide libraries.
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(seconds), str(memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            # A fixed hash seed, as SymPy's order of operations must not differ from run to run.
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        self._seconds = seconds
        self._ready = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, gold: str, answer: str) -> bool:
        """Compare.

        Raises:
            TimeoutError: no answer at the deadline
            WorkerDiedError: it was killed, or crashed
            RuntimeError: it did not start, which says nothing about the answer
        """
        self._wait_until_ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        except BrokenPipeError as error:
            raise WorkerDiedError from error
        return self._read(self._seconds) == EQUAL

    def kill(self) -> None:
        """Kill the worker and wait for its end."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _wait_until_ready(self) -> None:
        if self._ready:
            return
        try:
            self._ready = self._read(START_SECONDS) == READY
        except (TimeoutError, WorkerDiedError) as error:
            raise RuntimeError(
                f"the worker that runs math-verify did not start; {sys.executable} -c 'import math_verify' shows why"
            ) from error

    def _read(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        waiting = select.poll()  # select refuses the high descriptors of a process with many files open
        waiting.register(self._process.stdout, select.POLLIN)
        if not waiting.poll(1000 * seconds):
            raise TimeoutError
        said = self._process.stdout.read(1)
        if not said:
            raise WorkerDiedError
        return said


class MathPool:
    """Workers for as many threads as ask, at most `size` side by side; safe to use from any thread.

    Args:
        size: worker processes
        seconds: wall time of one comparison
        memory_bytes: address space of one worker
    """

    def __init__(self, size: int, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self.seconds = seconds
        self.memory_bytes = memory_bytes
        self._slots = threading.BoundedSemaphore(size)
        self._idle: list[MathWorker] = []

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether the answer equals the gold expression (both LaTeX, without \\boxed); None if it took too long.

        Expressions of more than `LONGEST` characters together are equal only if they are the same text. A worker that
        dies is replaced and the comparison tried once more; where that one dies too, the outcome is None. Expressions
        that don't fit into the worker's memory are not equal.

        Raises:
            RuntimeError: no worker can be started
        """
        if len(gold) + len(answer) > LONGEST:
            return gold == answer
        with self._slots:
            for attempt in range(2):
                worker = self._take() if attempt == 0 else self._new()  # idle ones may all have been killed
                try:
                    outcome = worker.ask(gold, answer)
                except TimeoutError:
                    worker.kill()
                    return None
                except WorkerDiedError:
                    worker.kill()
                except BaseException:  # interrupted: its answer, if one comes, would be taken for the next one's
                    worker.kill()
                    raise
                else:
                    self._idle.append(worker)
                    return outcome
        return None

    def workers(self) -> list[int]:
        """Process ids of the workers that wait for work."""
        return [worker.pid for worker in self._idle]

    def close(self) -> None:
        """End the workers that wait for work."""
        while self._idle:
            self._idle.pop().kill()

    def _take(self) -> MathWorker:
        try:
            return self._idle.pop()  # append and pop of a list are atomic
        except IndexError:
            return self._new()

    def _new(self) -> MathWorker:
        return MathWorker(self.seconds, self.memory_bytes)


def math_equal(gold: str, answer: str) -> bool | None:
    """Whether two LaTeX expressions are equal as mathematics, by math-verify; None: it took too long to tell.

    Deadline: `SECONDS`. Safe to call from any thread; the workers are shared, one for each core.
    """
    return _pool().equal(gold, answer)


def end_workers() -> None:
    """End the workers that wait for work; further work starts new ones."""
    _pool().close()


@cache
def _pool() -> MathPool:
    from branchmerge.machine import cores  # not by the worker

    pool = MathPool(size=cores())
    atexit.register(pool.close)
    return pool


# A fork must not use the parent's workers.
os.register_at_fork(after_in_child=_pool.cache_clear)


def _parsed(text: str) -> list[Any]:
    """math-verify's parse of a box with this text; without the sign at its end, if it finds no mathematics with it."""
    from math_verify import parse

    found = parse(f"\\boxed{{{text}}}", parsing_timeout=None)
    plain = SIGN.sub("", text)
    if plain != text and all(isinstance(one, str) for one in found):
        return parse(f"\\boxed{{{plain}}}", parsing_timeout=None)
    return found


def _serve(seconds: float, memory_bytes: int) -> None:
    """The worker: one line in, one byte out, until the input ends."""
    said = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    from math_verify import parse, verify

    # The first comparison builds tables; it is part of the start, so that no request's deadline includes it.
    verify(parse("\\boxed{1}", parsing_timeout=None), parse("\\boxed{1}", parsing_timeout=None), timeout_seconds=None)
    os.write(said, READY)
    for line in sys.stdin:
        # SIGALRM has no handler, so the kernel ends the worker even if the process that asked is gone.
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)
        # math-verify's own timeouts are off: they cannot stop C code, and would leave a half-done parse as the answer.
        gold, answer = map(_parsed, json.loads(line))
        equal = bool(gold) and bool(answer) and bool(verify(gold, answer, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(said, EQUAL if equal else OTHER)


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]))
