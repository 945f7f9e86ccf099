"""`python train.py ...`, forked from a process that has imported everything already, which is most of what it costs.

The child runs the script as Python would, with the arguments, the environment and the streams that it is given. Nothing
was computed before the fork, so no thread is missing in it.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]


class Warm:
    """The process that forks, and what it is asked to run, one script after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of `python <script> <arguments>` in the checkout."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            streams = [str(Path(folder) / name) for name in ("stdout", "stderr")]
            asked = {"argv": [script, *arguments], "env": {**os.environ, **env}, "streams": streams}
            print(json.dumps(asked), file=process.stdin, flush=True)
            status = process.stdout.readline()
            assert status, "the process that forks died"
            said = [Path(stream).read_text() for stream in streams]
        return subprocess.CompletedProcess([script, *arguments], int(status), *said)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    from branchmerge.cli import importing

    with importing():
        import branchmerge.evaluation.backends.hf
        import branchmerge.evaluation.run
        import branchmerge.merge
        import branchmerge.student.training  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            run_as_main(asked)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run_as_main(asked: dict[str, Any]) -> None:
    """What Python does with a script; does not return."""
    for number, stream in enumerate(("/dev/null", *asked["streams"])):
        os.dup2(os.open(stream, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv[:] = asked["argv"]
    sys.path[0] = str(PROJECT)
    status = 0
    try:
        runpy.run_path(asked["argv"][0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
