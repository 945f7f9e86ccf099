"""Run a program somebody's model wrote, with limits on time, memory, file size and output, in a process of its own.

What it holds: endless loops, memory hogs, output floods, crashes, early exits. What it does not: a program that means
harm can still read files and open connections as this user. Don't run code of models you distrust outside a
container.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
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
    # The worker says how it ended by this word on its real standard output; a program that exits early, or prints
    # "passed", does not know it.
    token = secrets.token_hex(16)
    task = {"program": program, "tests": list(tests), "token": token, "memory": memory_bytes, "seconds": seconds}
    with tempfile.TemporaryDirectory(prefix="branchmerge-") as folder:
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=folder, env={"PATH": os.defpath, "HOME": folder}, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = worker.communicate(json.dumps(task).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return TIMEOUT
        finally:
            _kill_group(worker)
    for outcome in (PASSED, FAILED):
        if said == f"{token}{outcome}".encode():
            return outcome
    return TIMEOUT if worker.returncode == -signal.SIGXCPU else CRASHED


def _kill_group(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and whatever it started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            pipe.close()
