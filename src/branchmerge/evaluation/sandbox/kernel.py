"""The few Linux calls that Python 3.11 does not offer, through libc; constants carry the kernel's names.

Sources: unshare(2), mount(2), mount_setattr(2), pivot_root(2), prctl(2), capset(2), landlock(7), seccomp(2).
"""

import ctypes
import os
import platform
import signal
import stat
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
SECCOMP_MODE_FILTER = 2
CAP_DAC_READ_SEARCH = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# Calls without a libc wrapper. Those from 424 on have one number on every architecture.
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(platform.machine(), -1)
SYS_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine(), -1)
SYS_CLOSE_RANGE, SYS_MOUNT_SETATTR = 436, 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446

LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
ACCESS_FS_WRITE_FILE, ACCESS_FS_READ_FILE, ACCESS_FS_READ_DIR = 1 << 1, 1 << 2, 1 << 3
ACCESS_FS_REMOVE_FILE, ACCESS_FS_MAKE_REG, ACCESS_FS_TRUNCATE = 1 << 5, 1 << 8, 1 << 14
ACCESS_FS_ON_FILES = ACCESS_FS_WRITE_FILE | ACCESS_FS_READ_FILE | ACCESS_FS_TRUNCATE
# File rights that a kernel of Landlock ABI 1, 2, 3, 4, 5 or later knows: REFER came with 2, TRUNCATE 3, IOCTL_DEV 5.
ACCESS_FS_ALL = [(1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1]
ACCESS_NET_ALL = 0b11  # TCP bind and connect; ABI 4
SCOPE_ALL = 0b11  # abstract Unix sockets and signals to processes outside; ABI 6

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_lock = ctypes.PyDLL(None, use_errno=True)
"""libc; a call keeps holding the interpreter lock."""


def _checked(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(number: int, what: str, *arguments: int | bytes | None) -> int:
    # An int would be cut to 32 bits in a variadic call.
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *words), what)


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def fork_into(namespaces: int) -> int:
    """Fork a process of one thread into new namespaces: 0 in the child, the child's pid in the parent.

    The child of unshare(2) and os.fork would be one process further away. libc and the interpreter don't notice this
    fork: the child should do little before it calls os.fork itself.
    """
    return _syscall(SYS_CLONE, "clone", namespaces | signal.SIGCHLD, 0, 0, 0, 0)


def fork() -> int:
    """Fork a process of one thread, without the interpreter's hooks: 0 in the child, the child's pid in the parent.

    The hooks of os.fork repair what other threads may have held, which here are none: they copy 150 pages, as many as
    the rest of a small job. They also seed `random` anew, which is left to the caller.
    """
    return _checked(_libc_with_lock.fork(), "fork")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    given = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _checked(_libc.mount(*given), f"mount {target}")


def make_readonly(target: str) -> None:
    """Make a mount, and those below it, read only and blind to set-user-ID bits. Needs Linux 5.12."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    what = f"mount_setattr {target}"
    _syscall(SYS_MOUNT_SETATTR, what, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes))


def pivot_to(root: str) -> None:
    """Make the mount at `root` the root of this mount namespace and let go of the old one."""
    os.chdir(root)
    # With both arguments the same the old root is stacked on the new one and can be detached by the same name.
    _syscall(SYS_PIVOT_ROOT, "pivot_root", b".", b".")
    _checked(_libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def prctl(option: int, value: int = 0, third: int | bytes = 0) -> None:
    pointer = ctypes.c_char_p(third) if isinstance(third, bytes) else ctypes.c_ulong(third)
    given = (ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _checked(_libc.prctl(option, *given), f"prctl {option}")


def set_capabilities(kept: int = 0) -> None:
    """Give up every capability but those in the mask `kept` (of the first 32)."""
    header = struct.pack("Ii", LINUX_CAPABILITY_VERSION_3, 0)
    sets = struct.pack("6I", kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable; low, then high half
    _checked(_libc.capset(header, sets), "capset")


def close_from(first: int) -> None:
    """Close every file descriptor from `first` on."""
    try:
        _syscall(SYS_CLOSE_RANGE, "close_range", first, (1 << 32) - 1, 0)
    except OSError:  # before Linux 5.9
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 without Landlock."""
    try:
        version = _syscall(
            SYS_LANDLOCK_CREATE_RULESET, "landlock_create_ruleset", None, 0, LANDLOCK_CREATE_RULESET_VERSION
        )
    except OSError:
        return 0
    return version


def landlock_ruleset(rules: list[tuple[str, int]]) -> int:
    """Files as `rules` say (a path, the rights at and below it) and no others, no TCP, no signals to outside.

    What of this the kernel's ABI does not know stays open; paths that do not exist are passed over.

    Returns:
        a descriptor for `landlock`

    Raises:
        OSError: without Landlock.
    """
    abi = landlock_abi()
    known = ACCESS_FS_ALL[min(abi, len(ACCESS_FS_ALL)) - 1] if abi else 0
    handled = struct.pack("QQQ", known, ACCESS_NET_ALL if abi >= 4 else 0, SCOPE_ALL if abi >= 6 else 0)
    # An older kernel takes the longer struct as long as what it does not know is zero.
    ruleset = _syscall(SYS_LANDLOCK_CREATE_RULESET, "landlock_create_ruleset", handled, len(handled), 0)
    for path, rights in rules:
        try:
            where = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue
        if not stat.S_ISDIR(os.fstat(where).st_mode):
            rights &= ACCESS_FS_ON_FILES
        rule = struct.pack("=Qi", rights & known, where)
        _syscall(SYS_LANDLOCK_ADD_RULE, "landlock_add_rule", ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
        os.close(where)
    return ruleset


def landlock(ruleset: int) -> None:
    """Put this thread under a ruleset. Needs no_new_privs."""
    _syscall(SYS_LANDLOCK_RESTRICT_SELF, "landlock_restrict_self", ruleset, 0)


def seccomp(program: bytes) -> None:
    """Put every system call of this thread from now on through a BPF program. Needs no_new_privs."""
    text = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(text))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_)
