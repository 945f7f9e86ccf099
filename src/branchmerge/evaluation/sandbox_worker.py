"""The other side of `sandbox.run_tests`: a fresh interpreter that limits itself, runs one program and says how it went.

Started as a script, isolated; imports nothing of this package.
"""

import json
import os
import resource
import sys


def main() -> None:
    task = json.load(sys.stdin)
    said = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    seconds = int(task["seconds"]) + 1
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_AS, task["memory"])
    limit(resource.RLIMIT_FSIZE, 1 << 20)
    limit(resource.RLIMIT_CORE, 0)

    namespace = {"__name__": "__main__"}
    exec(compile(task["program"], "<program>", "exec"), namespace)
    outcome = "passed"
    for number, test in enumerate(task["tests"]):
        try:
            exec(compile(test, f"<test {number}>", "exec"), namespace)
        except Exception:
            outcome = "failed_test"
            break
    os.write(said, f"{task['token']}{outcome}".encode())
    # Threads or exit handlers that the program left behind must not outlive the verdict.
    os._exit(0)


def limit(kind: int, value: int) -> None:
    """Lower a limit to `value`, or to the hard limit where that is lower already."""
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
