"""Run a program somebody's model wrote, with limits on time, memory, file size and output, in a process of its own.

What it holds: endless loops, memory hogs, output floods, crashes, early exits. What it does not: a program that means
harm can read files, open connections and leave detached processes as this user, and one written against this very
sandbox can find the word that means success. Don't run code of models you distrust outside a container.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

WORKER = Path(__file__).with_name("sandbox_worker.py")
SECONDS = 6.0
"""Time of one program with all its tests, import of Python included."""
MEMORY_BYTES = 1 << 30

PASSED, FAILED, TIMEOUT, CRASHED = "passed", "failed_test", "timeout", "crashed"


def run_tests(program: str, tests: Sequence[str], seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> str:
    """Run a Python program, then each test statement in its namespace.

    Returns:
        passed, failed_test (a test raised), timeout, or crashed (the program raised, exited or was killed).
    """
    if not tests:
        raise ValueError("a program without tests cannot pass or fail")
    # The worker says how it ended by this word; a program that exits early, or prints "passed", does not say it.
    token = secrets.token_hex(16)
    task = {"program": program, "tests": list(tests), "token": token, "memory": memory_bytes, "seconds": seconds}
    with tempfile.TemporaryDirectory(prefix="branchmerge-") as folder, tempfile.TemporaryFile() as given:
        given.write(json.dumps(task).encode())
        given.seek(0)
        reading, writing = os.pipe()
        try:
            worker = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER)],
                stdin=given, stdout=writing, stderr=subprocess.DEVNULL,
                cwd=folder, env={"PATH": os.defpath, "HOME": folder}, start_new_session=True,
            )  # fmt: skip
            said = _read(reading, len(token) + len(FAILED), worker, seconds)
            timed_out = said is None and worker.poll() is None
            _kill_group(worker)
        finally:
            os.close(reading)
            os.close(writing)
    for outcome in (PASSED, FAILED):
        if said == f"{token}{outcome}".encode():
            return outcome
    return TIMEOUT if timed_out or worker.returncode == -signal.SIGXCPU else CRASHED


def _read(pipe: int, most: int, worker: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """What the worker says, up to `most` bytes, in one piece; None if it ends or the time does without a word.

    Waits for the word or the worker's end, not for the end of the pipe: a process that the program started may hold
    that open for ever.
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = worker.poll() is not None
        ready, _, _ = select.select([pipe], [], [], 0 if ended else min(0.05, max(0.0, deadline - time.monotonic())))
        if ready:
            return os.read(pipe, most) or None
        if ended or time.monotonic() >= deadline:
            return None


def _kill_group(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and whatever it started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
