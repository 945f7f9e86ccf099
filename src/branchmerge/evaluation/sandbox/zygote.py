"""The process that every job is forked from: a small, fresh interpreter that has seen nothing of any job.

    zygote --fork--> keeper --fork, isolate--> job
    client --job, five descriptors--> keeper --report--> client

There are as many keepers as jobs may run at once; whichever is idle takes the next job from the one socket. None ever
reads a job: program and stdin come as descriptors, which only the job itself reads, and output goes straight to the
client. The keeper keeps the time, kills, cleans up and reports. It runs another job only if this one has left no
process and has not touched the folder; else it ends, and the zygote forks another. If the client ends, the zygote ends;
if the zygote ends, the kernel kills the keepers, and then their jobs.
"""

import gc
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from branchmerge.evaluation.sandbox import isolation, kernel, program
from branchmerge.evaluation.sandbox.isolation import BUBBLEWRAP, Limits, Place, Plan
from branchmerge.evaluation.sandbox.syscalls import seccomp_filter

JOB = struct.Struct("=dQ")
"""A job on its way to the zygote: seconds, bytes of memory. Its descriptors: program, stdin, stdout, stderr, report."""
REPORT = struct.Struct("=Bid")
"""A keeper's report: one of the next three, the job's wait status, seconds from fork to end."""
ENDED, OUT_OF_TIME, CANCELLED = range(3)
FAILURE = b"E"
"""First byte of the other message a client may get: why a job could not be isolated, and was not run."""

WARM = (
    "math collections itertools heapq bisect functools re string random json decimal fractions datetime typing copy "
    "operator contextlib dataclasses enum io statistics threading queue time warnings array struct textwrap"
)
"""What programs often import: loaded once here, found warm by every job."""
SECONDS_TO_LEAVE = 5
INTERVAL, SHORTEST, AT_WORK, PATIENCE = 0.5, 0.2, 0.001, 30.0
"""Seconds between two looks at a job that is late, at most and at least; of a processor for one at work in between;
and for which it may be late."""
BOOT = """
import sys, types
for name in ("branchmerge", "branchmerge.evaluation", "branchmerge.evaluation.sandbox"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = []
module.__path__ = [sys.argv[1]]
from branchmerge.evaluation.sandbox import zygote
zygote.{entry}
"""
"""Start of an interpreter without the package's own __init__ files: programs must not find the package in memory."""


@dataclass(frozen=True)
class Zygote:
    """What the zygote was started with, and the folder in which keepers without a root of their own get theirs."""

    plan: Plan
    workers: int
    packages: list[str]
    base: str | None
    control: socket.socket


def main() -> None:
    """Entry of the zygote. Arguments: this file's folder, level, number of keepers, control socket, package folders."""
    if isolation.raise_stack_limit():
        os.execve(sys.executable, sys.orig_argv, os.environ)
    _, level, workers, control, *packages = sys.argv[1:]
    with socket.socket(fileno=int(control)) as client:
        client.set_inheritable(False)
        watched = _watch_parent()
        try:
            zygote = _prepare(level, int(workers), packages, client)
        except Exception as error:
            client.send(json.dumps({"refused": f"{error}"}).encode())
            return
        client.send(json.dumps({"base": zygote.base}).encode())
        try:
            _serve(zygote, watched)
        finally:
            _leave(zygote)


def inside_bubblewrap() -> None:
    """Entry of a job's interpreter inside bwrap: limits, filter, program. Its arguments are a `Limits` and more."""
    _, seconds, memory, source, *packages = sys.argv[1:]
    sys.path += packages
    _hide_package()
    os.dup2(int(source), 3)
    kernel.close_from(4)
    isolation.set_environment()
    isolation.isolate_job(Plan(BUBBLEWRAP, []), Place(isolation.FOLDER), Limits(float(seconds), int(memory)))
    program.set_stage()
    program.run(_read_all(3))


def _watch_parent() -> int | None:
    """A descriptor that turns readable when the client ends, also where a fork of it keeps the socket open."""
    try:
        return os.pidfd_open(os.getppid())
    except OSError:  # before Linux 5.3
        return None


def _prepare(level: str, workers: int, packages: list[str], control: socket.socket) -> Zygote:
    for name in WARM.split():
        importlib.import_module(name)
    plan = isolation.make_plan(level, packages)
    if level != isolation.UNSAFE:
        seccomp_filter(0)  # most of it is the same for all jobs: built here, kept; refuses an unknown architecture
    if level in (isolation.FULL, isolation.NO_NAMESPACES) and not kernel.landlock_abi():
        raise OSError("the kernel has no Landlock")
    isolation.isolate_zygote(plan)
    # After all that may refuse: nobody would remove it.
    base = None if isolation.has_namespaces(level) else tempfile.mkdtemp(prefix="branchmerge-sandbox-")
    if base is not None:
        os.chmod(base, 0o711)  # noqa: PTH101  for jobs under another uid
    isolation.set_environment()
    # A job starts with no handler of ours, or of the client's.
    for number in (signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    sys.path += packages
    _hide_package()
    gc.collect()
    gc.disable()
    gc.freeze()  # a collection in a job would copy every page of what is loaded here
    return Zygote(plan, workers, packages, base, control)


def _hide_package() -> None:
    """Take this package out of a program's sight; what runs here keeps its modules alive."""
    for name in [name for name in sys.modules if name.split(".")[0] == "branchmerge"]:
        del sys.modules[name]


def _serve(zygote: Zygote, watched: int | None) -> None:
    """See to it that there are always as many keepers as jobs may run at once, until the client ends."""
    poll = select.poll()
    poll.register(zygote.control, 0)  # the jobs are for the keepers; here it only tells of the client's end
    if watched is not None:
        poll.register(watched, select.POLLIN)
    myself = os.pidfd_open(os.getpid())
    keepers: dict[int, int] = {}
    while True:
        while len(keepers) < zygote.workers:
            keeper = _fork(zygote.plan.level)
            if keeper == 0:
                _as_process(lambda: _keep(zygote, myself))
            descriptor = os.pidfd_open(keeper)
            keepers[descriptor] = keeper
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll():
            if descriptor not in keepers:
                return
            poll.unregister(descriptor)
            os.close(descriptor)
            os.waitpid(keepers.pop(descriptor), 0)


def _fork(level: str) -> int:
    """Fork a keeper. With namespaces it is the first process of its own: the kernel ends its job when it ends."""
    return kernel.fork_into(isolation.JOB_NAMESPACES) if isolation.has_namespaces(level) else os.fork()


def _as_process(work: Callable[[], None]) -> None:
    """Run `work` in a forked process and end it there, whatever happens: the caller's frames are the parent's."""
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def _keep(zygote: Zygote, parent: int) -> None:
    """The keeper: run one job after another, up to the first that leaves something behind."""
    _tie_to(parent)
    try:
        place = isolation.make_place(zygote.plan, zygote.base)
        keeper = os.pidfd_open(os.getpid())
        _set_stage()
    except OSError as error:
        _refuse(zygote, f"{error}")
        return
    gc.freeze()
    clean = True
    while clean:
        message, descriptors = _receive(zygote)
        if not message:
            break
        clean = _run(zygote, keeper, place, Limits(*JOB.unpack(message)), descriptors)
    if clean:
        _remove(zygote, place)


def _receive(zygote: Zygote) -> tuple[bytes, list[int]]:
    """The next job; an empty message when the client has gone."""
    message, descriptors, _, _ = socket.recv_fds(zygote.control, JOB.size, 5, socket.MSG_CMSG_CLOEXEC)
    return message, descriptors


def _refuse(zygote: Zygote, why: str) -> None:
    """Take a job only to tell the client why it cannot be isolated."""
    message, descriptors = _receive(zygote)
    if message:
        os.write(descriptors[4], FAILURE + why.encode())


def _set_stage() -> None:
    """Set the stage on files of the kinds that jobs get: a stream notes at its start what can be done with its file."""
    given, (_, said) = os.memfd_create("given"), os.pipe()
    for number, descriptor in enumerate((given, said, said)):
        os.dup2(descriptor, number)
    program.set_stage()


def _run(zygote: Zygote, keeper: int, place: Place, limits: Limits, descriptors: Sequence[int]) -> bool:
    """Run a job, wait for its end, its deadline or the client's word, report; whether all is as it was before.

    If it is not, the folder is removed: when the client has the report, nothing is left of the job.
    """
    random.seed()  # the job's: not the numbers of the one before
    report = descriptors[4]
    begin = time.monotonic()
    job = kernel.fork()
    if job == 0:
        _as_process(lambda: _become_job(zygote, keeper, place, limits, descriptors))
    for descriptor in descriptors[:4]:
        os.close(descriptor)
    how, status = _wait(job, report, begin, limits.seconds)
    seconds = time.monotonic() - begin
    clean = _is_alone() and isolation.is_untouched(place)
    if not clean:
        _remove(zygote, place)
    # A client that has gone does not read it.
    with suppress(OSError):
        os.write(report, REPORT.pack(how, status, seconds))
    os.close(report)
    return clean


def _wait(job: int, report: int, begin: float, seconds: float) -> tuple[int, int]:
    """Wait for a job, kill it if it must end; how it ended and its wait status.

    Its time is up after so many seconds. A job that is at work then, and had less of a processor than that, had to wait
    for others: it may go on until it has had as much, or for PATIENCE at most. One that sleeps may not.
    """
    poll = select.poll()
    ended = os.pidfd_open(job)
    poll.register(ended, select.POLLIN)
    poll.register(report, select.POLLIN)
    used, look = 0.0, begin + max(0.0, seconds - INTERVAL)
    while not (ready := {number for number, _ in poll.poll(max(0.0, look - time.monotonic()) * 1000)}):
        before, used = used, _processor_seconds(job)
        late = time.monotonic() - begin - seconds
        if late >= 0 and (used >= seconds or used - before < AT_WORK or late > PATIENCE):
            break
        look += min(INTERVAL, seconds) if late < 0 else min(INTERVAL, max(SHORTEST, seconds - used))
    os.close(ended)
    how = ENDED if ended in ready else CANCELLED if ready else OUT_OF_TIME
    # Also after its end: without a filter it may have left others in its group.
    for kill in (os.kill, os.killpg):
        with suppress(ProcessLookupError, PermissionError):
            kill(job, signal.SIGKILL)
    return how, os.waitpid(job, 0)[1]


def _processor_seconds(job: int) -> float:
    """What a process had so far, by its clock as clock_getcpuclockid(3) names it; not that of processes it started."""
    try:
        return time.clock_gettime((~job << 3) | 2)
    except OSError:
        return 0.0


def _is_alone() -> bool:
    """Whether this process has no child. The first one of a namespace inherits those of all others there."""
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def _become_job(zygote: Zygote, keeper: int, place: Place, limits: Limits, descriptors: Sequence[int]) -> None:
    """The job: take the descriptors, tie its life to the keeper's, isolate, run. Never returns."""
    try:
        os.setsid()
        for number, descriptor in enumerate(descriptors[1:4]):
            os.dup2(descriptor, number)
        if zygote.plan.level == BUBBLEWRAP:
            _tie_to(keeper)
            _exec_bubblewrap(zygote, limits, descriptors[0])
        source = _read_all(descriptors[0])
        # In the keeper's own namespace the kernel sees to that.
        tie = None if isolation.has_namespaces(zygote.plan.level) else lambda: _tie_to(keeper)
        isolation.isolate_job(zygote.plan, place, limits, tie)
    except BaseException as error:
        os.write(descriptors[4], FAILURE + f"{type(error).__name__}: {error}".encode())
        os._exit(70)
    kernel.close_from(3)
    program.run(source)


def _tie_to(parent: int) -> None:
    """Die with the parent (a pidfd), or now if it is dead already. A change of uid would undo it: call this after."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    if poll.poll(0):
        os._exit(70)


def _exec_bubblewrap(zygote: Zygote, limits: Limits, source: int) -> None:
    os.set_inheritable(source, True)
    options = ["-s", "-P", "-S", "-X", "utf8", "-c", BOOT.format(entry="inside_bubblewrap()")]
    arguments = [
        str(Path(__file__).parent),
        str(limits.seconds),
        str(limits.memory_bytes),
        str(source),
        *zygote.packages,
    ]
    command = isolation.bubblewrap_command(zygote.plan.readable) + options + arguments
    os.execv(command[0], command)


def _read_all(descriptor: int) -> bytes:
    """Read a memory file, whatever its position, and close it."""
    text = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    os.close(descriptor)
    return text


def _remove(zygote: Zygote, place: Place) -> None:
    """Remove the folder, where it does not end with the keeper's own namespace."""
    if zygote.base is not None:
        os.chmod(place.folder, 0o700)  # noqa: PTH101  the job may have taken our own rights away
        shutil.rmtree(place.folder)


def _leave(zygote: Zygote) -> None:
    """Wait until the keepers, whose client has gone, have killed and cleaned up; then remove what is left."""
    signal.alarm(SECONDS_TO_LEAVE)  # a keeper that hangs is killed with this process
    with suppress(OSError):
        zygote.control.shutdown(socket.SHUT_RDWR)  # a fork of the client may keep it open
    with suppress(ChildProcessError):
        while True:
            os.wait()
    if zygote.base is not None:
        shutil.rmtree(zygote.base, ignore_errors=True)
