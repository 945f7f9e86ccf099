"""What a level of the sandbox takes away, in three parts: for the zygote, for each keeper, and for each job.

    level                          files                     processes, network          system calls
    namespaces+landlock+seccomp    own root, Landlock        own namespaces              allow list
    namespaces+seccomp             own root                  own namespaces              allow list
    landlock+seccomp               Landlock                  by the filter alone         allow list
    bubblewrap                     bwrap's root              bwrap's namespaces          allow list
    unsafe                         as this user              as this user                all

All but `unsafe` also drop root's uid, except `bubblewrap`, where bwrap drops root's capabilities instead. Resource
limits and an empty environment are part of every level.
"""

import math
import os
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from branchmerge.evaluation.sandbox import kernel
from branchmerge.evaluation.sandbox.syscalls import seccomp_filter

FULL, NO_LANDLOCK, NO_NAMESPACES = "namespaces+landlock+seccomp", "namespaces+seccomp", "landlock+seccomp"
BUBBLEWRAP, UNSAFE = "bubblewrap", "unsafe"
LEVELS = (FULL, NO_LANDLOCK, NO_NAMESPACES, BUBBLEWRAP, UNSAFE)
"""From the strongest to none."""

NOBODY = 65534
"""User and group that root's jobs run as."""
STACK_BYTES = 512 << 20
FILE_BYTES = 16 << 20
"""Largest file of a job."""
FOLDER_BYTES = 64 << 20
"""All files of a job together, where its folder is a mount of its own."""
FOLDER = "/branchmerge-job"
"""A job's own folder, where it has a root of its own. Not /tmp, where an interpreter's packages may be."""
# The network and the IPC objects of a zygote are empty and stay so, since the filter lets no job touch either. To
# make new ones for each job would cost as much as all the rest.
ZYGOTE_NAMESPACES = kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
JOB_NAMESPACES = kernel.CLONE_NEWPID | kernel.CLONE_NEWNS
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""All that a job finds in os.environ: a pool of threads for each numpy would use up its address space."""

_PROCESSORS = os.cpu_count() or 1
_DEVICES = ("/dev/null", "/dev/urandom")
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
_READ = kernel.ACCESS_FS_READ_FILE | kernel.ACCESS_FS_READ_DIR
# Plain files only: no folders, links, sockets or devices, so that a job's folder is flat and simple to remove.
_OWN = _READ | kernel.ACCESS_FS_WRITE_FILE | kernel.ACCESS_FS_TRUNCATE
_OWN |= kernel.ACCESS_FS_MAKE_REG | kernel.ACCESS_FS_REMOVE_FILE


class RefusedError(RuntimeError):
    """A level does not work here, or one of its steps did not; no program was run."""


@dataclass(frozen=True)
class Limits:
    """What a job may use: wall clock in seconds, address space in bytes."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """What is the same for all jobs of a zygote: the level, what they may read, a mask of capabilities to keep."""

    level: str
    readable: list[str]
    kept: int = 0


@dataclass(frozen=True)
class Place:
    """Where a keeper's jobs run: their folder, and the Landlock ruleset of what they may touch, if they have one."""

    folder: str
    ruleset: int | None = None


def make_plan(level: str, packages: Sequence[str]) -> Plan:
    """The plan for a level; `packages` are folders from which programs may import."""
    readable = readable_paths(packages)
    # An interpreter in root's home is out of nobody's reach. Reading past modes is safe here: Landlock decides.
    hidden = level == NO_NAMESPACES and os.getuid() == 0 and not all(map(_open_to_all, readable))
    return Plan(level, readable, 1 << kernel.CAP_DAC_READ_SEARCH if hidden else 0)


def has_namespaces(level: str) -> bool:
    return level in (FULL, NO_LANDLOCK)


def readable_paths(packages: Sequence[str]) -> list[str]:
    """What a program may read: the interpreter's libraries, installed packages, the system's libraries, time zones.

    A path below another in the list is left out, as are those that do not exist.
    """
    wanted = {f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64", *sys.path, *packages, *_SYSTEM, *_DEVICES}
    paths = sorted(path for path in wanted if path.startswith("/") and Path(path).exists())
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]


def isolate_zygote(plan: Plan) -> None:
    """With namespaces: give this process a user namespace and a root in which there is nothing but what is readable.

    Root first makes the new root, for which it may need to pass folders that only root can pass, then drops its uid.

    Raises:
        OSError: the kernel or its administrator does not allow it.
    """
    if not has_namespaces(plan.level):
        return
    processes = os.open("/proc", os.O_PATH | os.O_DIRECTORY)  # stays usable when /proc is gone from view
    if os.getuid() == 0:
        kernel.unshare(kernel.CLONE_NEWNS)
        _make_root(plan.readable)
        become_nobody()
        _enter_user_namespace(processes)
    else:
        _enter_user_namespace(processes)
        _make_root(plan.readable)
    os.close(processes)
    # Same user, same namespace: without this a job could trace the zygote, if it got past the filter.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def become_nobody(kept_capabilities: int = 0) -> None:
    """Drop root's uid, gid and groups, and all capabilities but those in the mask."""
    if kept_capabilities:
        kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.set_capabilities(kept_capabilities)


def _enter_user_namespace(processes: int) -> None:
    user, group = os.getuid(), os.getgid()
    # A change of uid makes a process undumpable, and its /proc files root's.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
    kernel.unshare(ZYGOTE_NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        where = os.open(f"self/{name}", os.O_WRONLY, dir_fd=processes)
        os.write(where, text.encode())
        os.close(where)


def _make_root(readable: Sequence[str]) -> None:
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    # Opened before the new root covers a folder that some of them may be in.
    sources = [(path, os.open(path, os.O_PATH)) for path in readable]
    root = tempfile.gettempdir()
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path, source in sources:
        target = Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISDIR(os.fstat(source).st_mode):
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        kernel.mount(f"/proc/self/fd/{source}", str(target), flags=kernel.MS_BIND | kernel.MS_REC)
        os.close(source)
    Path(root + FOLDER).mkdir(exist_ok=True)
    kernel.pivot_to(root)
    kernel.make_readonly("/")


def make_place(plan: Plan, base: str | None) -> Place:
    """An empty folder for jobs, of this mount namespace or else in the folder `base`, and its ruleset.

    Raises:
        OSError: a step failed
    """
    if base is None:
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("tmpfs", FOLDER, "tmpfs", flags, f"size={FOLDER_BYTES},nr_inodes=10000,mode=700")
        folder = FOLDER
    else:
        folder = tempfile.mkdtemp(dir=base)
        if plan.level == NO_NAMESPACES and os.getuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
    os.utime(folder, (0, 0))
    return Place(folder, _ruleset(plan, folder) if plan.level in (FULL, NO_NAMESPACES) else None)


def _ruleset(plan: Plan, folder: str) -> int:
    null = ("/dev/null", _READ | kernel.ACCESS_FS_WRITE_FILE | kernel.ACCESS_FS_TRUNCATE)
    # A root of its own has nothing but the readable paths in it.
    paths = ["/"] if has_namespaces(plan.level) else plan.readable
    return kernel.landlock_ruleset([(folder, _OWN), null, *((path, _READ) for path in paths)])


def is_untouched(place: Place) -> bool:
    """Whether nothing was ever made, removed or listed in the folder; no job may set a time."""
    state = Path(place.folder).stat()
    return state.st_mtime_ns == state.st_atime_ns == 0 and stat.S_IMODE(state.st_mode) == 0o700


def isolate_job(plan: Plan, place: Place, limits: Limits, tie: Callable[[], None] | None = None) -> None:
    """Take from this process all that the plan's level takes, for good; then only the program is left to run.

    `tie` is called once the uid is what it will be, and before the filter.

    Raises:
        OSError: a step failed; the program must not be run.
    """
    os.chdir(place.folder)
    os.umask(0o077)
    set_limits(limits, has_namespaces(plan.level))
    if plan.level == NO_NAMESPACES and os.getuid() == 0:
        become_nobody(plan.kept)
    if tie is not None:
        tie()
    if plan.level == UNSAFE:
        return
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if place.ruleset is not None:
        kernel.landlock(place.ruleset)
    kernel.set_capabilities(plan.kept)
    kernel.seccomp(seccomp_filter(os.getpid()))


def set_environment() -> None:
    os.environ.clear()
    os.environ.update(ENVIRONMENT)


def _open_to_all(path: str) -> bool:
    """Whether every folder on the way to a path lets everybody pass and the path itself lets everybody read."""
    return all(parent.stat().st_mode & 0o001 for parent in Path(path).parents) and bool(Path(path).stat().st_mode & 0o4)


def set_limits(limits: Limits, own_user_namespace: bool) -> None:
    """Set the resource limits of this process, each at most what it may have now."""
    # Threads count as processes of the user; in a namespace of its own the user has no others.
    threads = 512 if own_user_namespace else 8192
    for kind, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        # The wall clock is the limit; this one is for the case that nobody is left to look at it.
        (resource.RLIMIT_CPU, (math.ceil(limits.seconds) + 1) * _PROCESSORS),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_NPROC, threads),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def raise_stack_limit() -> bool:
    """Raise the soft limit of the main thread's stack to STACK_BYTES if the hard one allows; whether it changed.

    Deep recursion through C code (a cached function, a sort key) needs it. The kernel lays out memory for the limit
    that held when the interpreter was executed: execute it again after a change.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return False
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
    return True


def bubblewrap_command(readable: Sequence[str]) -> list[str]:
    """bwrap with the same files in view and everything else its own; the command to run inside is to be added.

    Raises:
        OSError: bwrap is not installed.
    """
    bwrap = shutil.which("bwrap", path=os.defpath + ":/usr/local/bin")
    if bwrap is None:
        raise FileNotFoundError(2, "bwrap is not installed")
    python = str(Path(sys.executable).resolve())
    here = str(Path(__file__).parent)
    command = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    command += ["--setenv", "PYTHONHASHSEED", "0"]
    for path in [*readable, python, here]:
        command += ["--dev-bind" if path in _DEVICES else "--ro-bind", path, path]
    return [*command, "--tmpfs", FOLDER, "--remount-ro", "/", "--chdir", FOLDER, "--", python]
