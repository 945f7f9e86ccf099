"""The client side of the sandbox: start the zygote and send it jobs."""

import atexit
import json
import os
import platform
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from types import TracebackType

from branchmerge.errors import UserError
from branchmerge.evaluation.sandbox.collector import Collector, Job, Outcome
from branchmerge.evaluation.sandbox.isolation import LEVELS, UNSAFE, RefusedError
from branchmerge.evaluation.sandbox.zygote import BOOT, JOB
from branchmerge.machine import cores

SECONDS_TO_START = 60.0


class Sandbox:
    """Runs jobs, each in a fork of a clean interpreter. Thread-safe; not for use in a fork of the process.

    If the zygote dies, for example because the system runs out of memory, it is replaced at the next job. A job that
    was running is run once more; if the zygote dies again, its status is killed.

    Args:
        level: one of `isolation.LEVELS`; auto takes the strongest that works here, but never unsafe.
        workers: how many jobs run at once; by default one for each processor this process may use.

    Raises:
        UserError: the level does not exist or does not work here.
    """

    level: str

    def __init__(self, level: str = "auto", workers: int | None = None) -> None:
        if level not in ("auto", *LEVELS):
            raise UserError(f"no sandbox level {level!r}; the levels are auto, {', '.join(LEVELS)}")
        if platform.system() != "Linux":
            raise UserError(f"the sandbox for programs needs Linux; this is {platform.system()}")
        self._workers = workers or cores()
        self._slots = threading.BoundedSemaphore(self._workers)
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._closed = False
        self._zygote: _Zygote | None = None
        self._start(LEVELS[: LEVELS.index(UNSAFE)] if level == "auto" else (level,))

    def _start(self, levels: tuple[str, ...]) -> None:
        refused = []
        for self.level in levels:
            try:
                outcome = self.run(Job("print('ready')", seconds=SECONDS_TO_START))
                if outcome.status == "ok" and outcome.stdout == b"ready\n":
                    return
                refused.append(f"{self.level}: {outcome.status} {outcome.stderr}")
            except RefusedError as error:
                refused.append(f"{self.level}: {error}")
            self._discard(self._zygote)
        raise UserError(
            f"programs cannot be isolated on this machine ({'; '.join(refused)}). Allow user namespaces, use a kernel "
            f"with Landlock, or install bubblewrap; sandbox level {UNSAFE} runs them as your own user instead"
        )

    def run(self, job: Job) -> Outcome:
        """Run a job to its end and return how it went. Whatever the program does, this does not raise.

        Raises:
            RuntimeError: the sandbox is closed or another process's, or a step of the isolation failed: then the
                program was not run.
        """
        with self._slots:
            for _ in range(2):
                try:
                    zygote = self._living_zygote()
                except ChildProcessError:
                    continue
                outcome = zygote.run(job)
                if outcome is not None:
                    return outcome
                self._discard(zygote)
        return Outcome("killed", b"", "the process that runs programs died twice while it ran this one", 0.0)

    def close(self) -> None:
        """End the zygote and all that is still running."""
        self._closed = True
        if self._owner == os.getpid():
            self._discard(self._zygote)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, where: TracebackType | None) -> None:
        self.close()

    def _living_zygote(self) -> "_Zygote":
        if self._owner != os.getpid():
            raise RuntimeError("this sandbox belongs to another process; make one after the fork")
        with self._lock:
            if self._closed:
                raise RuntimeError("this sandbox is closed")
            if self._zygote is None:
                self._zygote = _Zygote(self.level, self._workers)
            return self._zygote

    def _discard(self, zygote: "_Zygote | None") -> None:
        with self._lock:
            if zygote is not None and zygote is self._zygote:
                self._zygote = None
                zygote.close()


class _Zygote:
    """One zygote process and the socket to it."""

    def __init__(self, level: str, workers: int) -> None:
        self._level = level
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = sysconfig.get_paths()
        packages = dict.fromkeys([paths["purelib"], paths["platlib"]])
        # A fixed hash seed, so that a program which depends on the order of a set gets the same verdict every time.
        # It is why -s -P with an environment of our own stand for -I, which would ignore the seed.
        # The libraries' functions are looked up at the start: each job would do it again, in pages of its own.
        environment = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}
        if "LD_LIBRARY_PATH" in os.environ:  # the interpreter itself may not start without
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        options = ["-s", "-P", "-S", "-X", "utf8", "-c", BOOT.format(entry="main()")]
        arguments = [str(Path(__file__).parent), level, str(workers), str(theirs.fileno()), *packages]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *options, *arguments], env=environment, cwd="/", pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._control.settimeout(SECONDS_TO_START)
        try:
            said = json.loads(self._control.recv(1 << 16) or b"{}")
        except TimeoutError:
            said = {}
        self._base: str | None = said.get("base")
        if "base" not in said:
            self.close()
            raise RefusedError(said["refused"]) if said else ChildProcessError("the zygote died at its start")

    def run(self, job: Job) -> Outcome | None:
        """Run one job; None if the zygote or the job's keeper died before its report."""
        with ExitStack() as stack:
            source = stack.enter_context(_memory_file(job.program))
            given = stack.enter_context(_memory_file(job.stdin))
            pipes = [os.pipe(), os.pipe()]
            report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            readers = [stack.enter_context(open(reading, "rb", buffering=0)).fileno() for reading, _ in pipes]  # noqa: PTH123
            stack.enter_context(report)
            handed = [source, given, *(writing for _, writing in pipes), theirs.detach()]
            try:
                socket.send_fds(self._control, [JOB.pack(job.seconds, job.memory_bytes)], handed)
            except OSError:
                return None
            finally:
                for descriptor in handed[2:]:
                    os.close(descriptor)
            return Collector(job, self._level, readers, report).outcome()

    def close(self) -> None:
        """End the process; it ends its jobs."""
        self._control.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._base is not None:
            rmtree(self._base, ignore_errors=True)


@contextmanager
def _memory_file(text: str) -> Iterator[int]:
    """An anonymous file with a text, positioned at its beginning."""
    number = os.memfd_create("given")
    try:
        with open(number, "wb", closefd=False) as file:
            # Invalid text (half a surrogate pair) is passed on, for the program's interpreter to refuse.
            file.write(text.encode(errors="surrogatepass"))
        os.lseek(number, 0, os.SEEK_SET)
        yield number
    finally:
        os.close(number)


_shared: dict[str, Sandbox] = {}
_level = "auto"
_shared_lock = threading.Lock()


def use(level: str) -> None:
    """Set the level of `shared()` from now on."""
    global _level
    _level = level


def shared(level: str | None = None) -> Sandbox:
    """This process's sandbox of a level (or the one set by `use`), started at first use and closed at exit.

    Raises:
        UserError: the level does not exist or does not work here.
    """
    with _shared_lock:
        level = level or _level
        if level not in _shared:
            _shared[level] = Sandbox(level)
            atexit.register(_shared[level].close)
        return _shared[level]


def _forget() -> None:
    """In a fork: the zygote belongs to the parent, and the lock may be held by a thread that does not exist here."""
    global _shared_lock
    _shared.clear()
    _shared_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
