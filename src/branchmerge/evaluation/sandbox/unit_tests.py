"""Programs whose tests are Python statements: program and tests run in one job, and the job says how it went.

Program and tests share a process, so a program written against this very function can find the word that means
success. Where that matters, run the program alone and compare its output outside (`Sandbox.run`).
"""

import json
import secrets
from collections.abc import Sequence

from branchmerge.evaluation.sandbox.client import shared
from branchmerge.evaluation.sandbox.collector import Job

SECONDS = 6.0
"""Time of one program with all its tests."""
MEMORY_BYTES = 1 << 30
PASSED, FAILED, TIMEOUT, CRASHED = "passed", "failed_test", "timeout", "crashed"

# Prints of the program go nowhere. The word that says how the tests went is written last, by a function that the
# program's own names cannot replace.
_HARNESS = """
def _run(program, tests, token):
    import os
    said, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    write, leave = os.write, os._exit
    os.dup2(nothing, 1)
    namespace = globals()
    del namespace["_run"]
    exec(compile(program, "<program>", "exec"), namespace)
    outcome = "passed"
    for number, test in enumerate(tests):
        try:
            exec(compile(test, f"<test {number}>", "exec"), namespace)
        except Exception:
            outcome = "failed_test"
            break
    write(said, f"{token}{outcome}".encode())
    leave(0)
"""


def run_tests(program: str, tests: Sequence[str], seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> str:
    """Run a Python program, then each test statement in its namespace, in the process's shared sandbox.

    Returns:
        passed, failed_test (a test raised), timeout, or crashed (the program raised, exited or was killed).

    Raises:
        ValueError: there are no tests.
        UserError: no level of the sandbox works here.
    """
    if not tests:
        raise ValueError("a program without tests cannot pass or fail")
    # A program that exits early, or prints "passed", does not say this word.
    token = secrets.token_hex(16)
    given = json.dumps([program, list(tests), token])
    source = f"{_HARNESS}\n_run(*__import__('json').loads({given!r}))\n"
    outcome = shared().run(Job(source, seconds=seconds, memory_bytes=memory_bytes, output_bytes=1 << 10))
    for verdict in (PASSED, FAILED):
        if outcome.stdout == f"{token}{verdict}".encode():
            return verdict
    return TIMEOUT if outcome.status == "timeout" else CRASHED
