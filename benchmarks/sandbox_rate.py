"""Small programs a second in the sandbox, next to fresh interpreters without isolation, on all processors.

    python benchmarks/sandbox_rate.py [--seconds 5] [--level auto]

Prints one JSON line. A small program reads two numbers and prints their sum; every output is checked. Both sides are
driven by one thread a processor, in turns, so that what else runs on the machine burdens both alike.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from branchmerge.evaluation.sandbox import Job, Sandbox

PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"
GIVEN, EXPECTED = "20 22\n", b"42\n"
ROUNDS = 5


def rate(execute: Callable[[], bytes], threads: int, seconds: float) -> float:
    """Executions a second of `threads` threads that each execute again and again for `seconds`."""
    counts = [0] * threads
    deadline = time.monotonic() + seconds

    def work(number: int) -> None:
        while time.monotonic() < deadline:
            if execute() == EXPECTED:
                counts[number] += 1

    begin = time.monotonic()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.monotonic() - begin)


def fresh_interpreter() -> bytes:
    command = [sys.executable, "-I", "-c", PROGRAM]
    return subprocess.run(command, input=GIVEN.encode(), capture_output=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each side, all rounds together")
    parser.add_argument("--level", default="auto", help="of the sandbox")
    options = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    inside, outside = [], []
    with Sandbox(options.level) as sandbox:
        for _ in range(ROUNDS):
            inside.append(rate(lambda: sandbox.run(Job(PROGRAM, GIVEN)).stdout, threads, options.seconds / ROUNDS))
            outside.append(rate(fresh_interpreter, threads, options.seconds / ROUNDS))
        result = {
            "benchmark": "sandbox_rate",
            "executions_per_s": round(sum(inside) / ROUNDS, 1),
            "best_round_per_s": round(max(inside), 1),
            "python_isolated_subprocess_per_s": round(sum(outside) / ROUNDS, 1),
            "level": sandbox.level,
            "user": "root" if os.getuid() == 0 else "ordinary",
            "processors": threads,
            "python": sys.version.split()[0],
            "kernel": os.uname().release,
            "date": datetime.now(UTC).date().isoformat(),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
