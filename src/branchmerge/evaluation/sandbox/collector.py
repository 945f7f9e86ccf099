"""A job and its outcome: reads what the job prints, until its keeper reports how it ended."""

import os
import select
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from branchmerge.evaluation.sandbox.isolation import BUBBLEWRAP, RefusedError
from branchmerge.evaluation.sandbox.program import MEMORY_EXIT
from branchmerge.evaluation.sandbox.zygote import CANCELLED, FAILURE, OUT_OF_TIME, REPORT

STDERR_BYTES = 2048
"""How much of the end of stderr is kept."""
SECONDS_TO_REPORT = 60.0
"""Seconds after a job's deadline until its report must come, else the zygote is given up."""


@dataclass(frozen=True)
class Job:
    """A program and what it may use.

    Memory is address space. Standard output beyond `output_bytes` ends the job. Seconds are wall clock from fork to
    end; on a busy machine, CPU time for a job that is still computing, except at the level `bubblewrap`.
    """

    program: str
    stdin: str = ""
    seconds: float = 6.0
    memory_bytes: int = 4 << 30
    output_bytes: int = 16 << 20


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    `status` is ok (exit code 0), error (an uncaught exception, another exit code), timeout, memory (an uncaught
    MemoryError), output (too much of it) or killed (a signal, a forbidden system call). `stdout` is at most the job's
    `output_bytes`, `stderr` the last 2 kB for a person to read, `seconds` the wall clock.
    """

    status: str
    stdout: bytes
    stderr: str
    seconds: float


class Collector:
    """Reads a job's two outputs until its report has come."""

    def __init__(self, job: Job, level: str, readers: list[int], report: socket.socket) -> None:
        self._job, self._level, self._report = job, level, report
        self._out, self._err = readers
        self._stdout, self._stderr = bytearray(), bytearray()
        self._poll = select.poll()
        for number in (self._out, self._err, report.fileno()):
            self._poll.register(number, select.POLLIN)
        self._too_much = False

    def outcome(self) -> Outcome | None:
        deadline = time.monotonic() + self._job.seconds + SECONDS_TO_REPORT
        message: bytes | None = None
        while message is None:
            left = deadline - time.monotonic()
            ready = [number for number, _ in self._poll.poll(max(0.0, left) * 1000)]
            if not ready:
                return None
            self._read(ready)
            if self._report.fileno() in ready:
                message = self._receive()
        # What a job wrote is in the pipes when its report comes; their end may never come, without isolation.
        self._poll.unregister(self._report.fileno())
        while ready := [number for number, _ in self._poll.poll(0)]:
            self._read(ready)
        if message[:1] == FAILURE:
            raise RefusedError(message[1:].decode(errors="replace"))
        return self._judge(*REPORT.unpack(message)) if message else None

    def _receive(self) -> bytes:
        try:
            return self._report.recv(1 << 12)
        except ConnectionError:
            return b""

    def _read(self, ready: list[int]) -> None:
        if self._err in ready:
            self._stderr += self._take(self._err)
            del self._stderr[:-STDERR_BYTES]
        if self._out in ready:
            self._stdout += self._take(self._out)
            if len(self._stdout) > self._job.output_bytes and not self._too_much:
                self._too_much = True
                with suppress(OSError):  # the keeper may be gone
                    # Not a message: one that the keeper leaves unread would break its report.
                    self._report.shutdown(socket.SHUT_WR)
            del self._stdout[self._job.output_bytes :]

    def _take(self, number: int) -> bytes:
        data = os.read(number, 1 << 16)
        if not data:
            self._poll.unregister(number)
        return data

    def _judge(self, how: int, status: int, seconds: float) -> Outcome:
        code = os.waitstatus_to_exitcode(status)
        if self._level == BUBBLEWRAP and code > 128:
            code = 128 - code  # bwrap says in this way that its child was killed
        if self._too_much:
            said = "output"
        elif how == OUT_OF_TIME or code == -signal.SIGXCPU:
            said = "timeout"
        elif how == CANCELLED or code < 0:
            said = "killed"
        else:
            said = {0: "ok", MEMORY_EXIT: "memory"}.get(code, "error")
        return Outcome(said, bytes(self._stdout), self._stderr.decode(errors="replace"), seconds)
