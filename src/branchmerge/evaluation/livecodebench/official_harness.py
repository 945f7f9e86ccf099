"""LiveCodeBench's own way to run a solution, faults included, inside the sandbox; sent after `harness`'s text.

One process runs all cases of a program, as there, so what a case leaves behind is there in the next. For `stdin` cases
the top-level code becomes the body of a function, imports excepted, and standard input is an object with some of a
file's methods. Results go to the grader, which alone knows the expected ones.

Source: lcb_runner/evaluation/testing_util.py of LiveCodeBench at 28fef95, repeated here in other words.
"""

import ast
import builtins
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from branchmerge.evaluation.livecodebench.harness import PREAMBLE, encode, reporter

REMOVED = {
    os: "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames truncate replace "
    "unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir",
    shutil: "rmtree move chown",
    subprocess: "Popen",
    builtins: "quit help",
}
"""Functions that are None there."""
HIDDEN = ("ipdb", "joblib", "resource", "psutil", "tkinter")
"""Modules that cannot be imported there."""


class Late(Exception):  # noqa: N818 - its name must hold what LiveCodeBench looks for in the representation
    """Raised by the alarm wherever the solution is, which may catch it."""

    def __repr__(self) -> str:
        return "TimeoutException()"


class Input:
    """Standard input as a solution sees it: `read` always gives everything, it is not iterable, and so on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._file = io.StringIO(text)
        self.buffer = Bytes(text.encode())

    def read(self, *_: Any) -> str:
        return self._text

    def readline(self, *arguments: Any) -> str:
        return self._file.readline(*arguments)

    def readlines(self, *_: Any) -> list[str]:
        return self._text.split("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Bytes:
    """`sys.stdin.buffer`: whole or its first line, ever again."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def read(self, *_: Any) -> bytes:
        return self._raw

    def readline(self, *_: Any) -> bytes:
        return self._raw.split(b"\n")[0] + b"\n"


def late(*_: Any) -> None:
    # Printed there too; it spoils the output of a solution that catches the exception.
    print("timeout")
    raise Late


def wrapped(code: str) -> str:
    """The program as a module with one function; unchanged if it cannot be parsed or unparsed."""
    with suppress(Exception):
        body = ast.parse(code).body
        last = body[-1]
        if isinstance(last, ast.If) and ast.unparse(last.test).strip() == "__name__ == '__main__'":
            code = f"{_source(body[:-1])}\n{_source(last.body)}"
    with suppress(Exception):
        body = ast.parse(code).body
        imports = [statement for statement in body if isinstance(statement, ast.Import | ast.ImportFrom)]
        rest = [statement for statement in body if not isinstance(statement, ast.Import | ast.ImportFrom)]
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        function = ast.FunctionDef(name="wrapped_function", args=nothing, body=rest, decorator_list=[], lineno=-1)
        return f"{PREAMBLE}\n{_source(imports)}\n{ast.unparse(function)}"
    return code


def _source(statements: list[Any]) -> str:
    return "\n".join(ast.unparse(statement) for statement in statements)


def loaded(code: str, seconds: int) -> Any:
    """The module that the code makes, or an instance of Solution where the code has such a class."""
    module = ModuleType("tmp_sol")
    signal.alarm(seconds)
    try:
        exec(compile(code, "<string>", "exec", 0, True), module.__dict__)
        return module.Solution() if "class Solution" in code else module
    finally:
        signal.alarm(0)


def call_with_input(function: Any, text: str) -> str:
    """What the function prints, given the text as standard input."""
    # The original object is patched too: `from sys import stdin` has found it before the call.
    original, output, lines = sys.stdin, sys.stdout, iter(text.split("\n"))
    patched = {"read": lambda *_: text, "readlines": lambda *_: text.split("\n"), "readline": lambda *_: next(lines)}
    vars(original).update(patched)
    open_, captured = builtins.open, io.StringIO()
    sys.stdin, sys.stdout = Input(text), captured
    setattr(captured, "close", lambda _: None)  # noqa: B010
    builtins.open = lambda *_, **__: io.StringIO(text)  # type: ignore[assignment]
    try:
        with suppress(SystemExit):
            function()
    finally:
        builtins.open, sys.stdin, sys.stdout = open_, original, output
        for name in patched:
            vars(original).pop(name, None)
    return captured.getvalue()


def run(task: dict[str, Any], results: list[Any]) -> None:
    """Run the cases in order and add the result of each until one raises."""
    function, seconds = task["function"], task["seconds"]
    code = f"{PREAMBLE}\n\n{task['solution']}" if function else wrapped(task["solution"])
    method = getattr(loaded(code, seconds), function or "wrapped_function")
    given: list[Any] = task["inputs"]
    if function:
        given = [[json.loads(line) for line in text.split("\n")] for text in given]
    for arguments in given:
        signal.alarm(seconds)
        try:
            if function:
                value = method(*arguments)
                results.append(encode(list(value) if isinstance(value, tuple) else value, official=True))
            else:
                results.append(call_with_input(method, arguments))
        finally:
            signal.alarm(0)


def run_officially() -> None:
    """Read a task from standard input, run it, report the results and what ended it."""
    task = json.loads(sys.stdin.read())
    report = reporter(task["token"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.set_int_max_str_digits(50_000)
    signal.signal(signal.SIGALRM, late)
    os.environ["OMP_NUM_THREADS"] = "1"
    with suppress(ImportError):
        import numpy  # noqa: F401  loaded there before anything is taken away, without which it cannot be
    for module, names in REMOVED.items():
        for name in names.split():
            setattr(module, name, None)
    sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]
    results: list[Any] = []
    error = ""
    try:
        run(task, results)
    except Exception as raised:
        error = repr(raised)
    report({"results": results, "error": error})
