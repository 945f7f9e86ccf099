"""The last steps inside a job's own process: run the program as `python program.py` would, and leave.

The stage is set before the job's process is forked: what is made there is not made, nor its pages copied, for each job.

Imported by the zygote; from here on nothing of this package is within the program's reach but its own call stack.
"""

import atexit
import gc
import linecache
import os
import site
import sys
import tempfile
import threading
import traceback
from types import ModuleType

MEMORY_EXIT = 113
"""Exit code of a program that an uncaught MemoryError ended."""
THREAD_STACK_BYTES = 16 << 20
"""Of a thread whose program does not say. Else each would get the main thread's size, of which few fit into memory."""
NAME = "program.py"
_STREAMS = [("stdin", "r", "surrogateescape"), ("stdout", "w", "surrogateescape"), ("stderr", "w", "backslashreplace")]


def run(source: bytes) -> None:
    """Run a program on the stage and end this process with the program's exit code."""
    gc.enable()
    try:
        text = source.decode()
        linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)
        code = compile(text, NAME, "exec", dont_inherit=True)
        exec(code, sys.modules["__main__"].__dict__)
        status = 0
    except SystemExit as leaving:
        status = _exit_code(leaving.code)
    except BaseException as error:
        status = _report(error)
    os._exit(_finish(status))


def set_stage() -> None:
    """A fresh __main__, standard streams on file descriptors 0, 1 and 2, and what `site` adds."""
    main = ModuleType("__main__")
    main.__dict__.update(__file__=NAME, __builtins__=sys.modules["builtins"])
    sys.modules["__main__"] = main
    sys.argv = [NAME]
    for number, (name, mode, errors) in enumerate(_STREAMS):
        buffering = 1 if name == "stderr" else -1
        # The interpreter's own streams were made for other files; what they know of those (seekable or not) is stale.
        stream = open(number, mode, buffering, "utf-8", errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    threading.stack_size(THREAD_STACK_BYTES)
    tempfile.tempdir = None  # not where the zygote may write
    site.setquit()  # exit() and quit()


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> int:
    """Write a traceback that begins in the program, not in `run`; return the exit code."""
    begin = error.__traceback__.tb_next if error.__traceback__ else None
    try:
        traceback.print_exception(type(error), error, begin, file=sys.__stderr__)
    except BaseException:
        # An exception of the program's making whose text raises, or no memory left to write it.
        os.write(2, f"{type(error).__name__}\n".encode())
    return MEMORY_EXIT if isinstance(error, MemoryError) else 1


def _finish(status: int) -> int:
    """Wait for the program's threads, run its exit handlers, flush, as the interpreter does at its end.

    Tearing the interpreter down as well would double the time of a small program.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except MemoryError:
        return MEMORY_EXIT
    except BaseException:
        return status or 120
    return status
