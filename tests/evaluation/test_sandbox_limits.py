"""Each limit, right and system call that a level takes away, looked at by a program inside; also those that a second
wall stands behind, so that no attack gets through when one of them falls."""

import os
import platform
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from attacking import ISOLATING, PATIENCE, attack, eventually, named, naming, sandbox_or_skip, zygotes

from branchmerge.evaluation.sandbox import Job, Sandbox, zygote
from branchmerge.evaluation.sandbox.isolation import BUBBLEWRAP, FULL, LEVELS, NOBODY, UNSAFE, has_namespaces

INTEL = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_or_skip(request.param) as made:
        yield made


@pytest.fixture
def isolating(sandbox: Sandbox) -> Sandbox:
    if sandbox.level not in ISOLATING:
        pytest.skip("takes nothing away")
    return sandbox


def test_the_strongest_level_is_taken_where_the_system_gives_it() -> None:
    """Else a level that broke would be passed over: by `auto`, and by the tests, which skip what is refused."""
    asked = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork"]
    probe = [*asked, "sh", "-c", "mount -t tmpfs x /tmp && mkdir /tmp/y && mount --bind /usr /tmp/y"]
    as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    try:
        gives = subprocess.run(probe, cwd="/", capture_output=True, **as_nobody).returncode == 0  # type: ignore[call-overload]
    except FileNotFoundError:
        gives = False
    code = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1))"  # the version of Landlock
    version = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    if not gives or version < 1 or tuple(map(int, platform.release().split(".")[:2])) < (5, 12):
        pytest.skip("no namespaces, no Landlock or an old kernel")
    with Sandbox(workers=1) as made:
        assert made.level == FULL


def test_limits_are_those_that_are_promised(sandbox: Sandbox) -> None:
    names = ("AS", "CPU", "FSIZE", "CORE", "NOFILE", "NPROC")
    code = f"import resource\nfor name in {names}:\n    print(*resource.getrlimit(getattr(resource, 'RLIMIT_' + name)))"
    outcome = sandbox.run(Job(code, seconds=PATIENCE + 0.5, memory_bytes=3 << 30))
    threads = 512 if has_namespaces(sandbox.level) else 8192
    promised = (3 << 30, (31 + 1) * (os.cpu_count() or 1), 16 << 20, 0, 256, threads)
    for name, value, line in zip(names, promised, outcome.stdout.decode().splitlines(), strict=True):
        _, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        assert (name, line) == (name, f"{most} {most}")


def test_all_files_together_are_bounded(isolating: Sandbox) -> None:
    """They lie in the machine's memory, beside the limit on a job's own."""
    if not has_namespaces(isolating.level):
        pytest.skip("the folder is on a disk")
    large = """
written = 0
try:
    for number in range(40):
        with open(f'file{number}', 'wb', buffering=0) as file:
            for _ in range(8):
                written += file.write(bytes(1 << 20))
except OSError as error:
    print(error.errno, written)
"""
    number, written = map(int, attack(isolating, large).stdout.split())
    assert number == 28 and 60 << 20 < written <= 64 << 20  # ENOSPC
    many = """
try:
    for number in range(20_000):
        open(f'{number}', 'w').close()
except OSError as error:
    print(error.errno, number)
"""
    number, made = map(int, attack(isolating, many).stdout.split())
    assert number == 28 and 9_000 < made <= 10_000


def test_a_job_is_nobody_and_may_nothing(isolating: Sandbox) -> None:
    code = """
import ctypes, os, struct
header, sets = ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0)), ctypes.create_string_buffer(24)
assert ctypes.CDLL(None).capget(header, sets) == 0
print(*os.getresuid(), *os.getresgid(), len([g for g in os.getgroups() if g != os.getgid()]), oct(os.umask(0)))
print(*struct.unpack('6I', sets.raw))
"""
    ids, capabilities = attack(isolating, code).stdout.decode().splitlines()
    user, group = (NOBODY, NOBODY) if os.getuid() == 0 else (os.getuid(), os.getgid())
    if isolating.level != BUBBLEWRAP:
        groups = "0" if os.getuid() == 0 else ids.split()[6]
        assert ids == f"{user} {user} {user} {group} {group} {group} {groups} 0o77"
    # By Landlock alone, the right to read past modes may stay: Landlock decides.
    allowed = {0, 4} if isolating.level == "landlock+seccomp" else {0}
    assert set(map(int, capabilities.split())) <= allowed


def test_processes_of_the_sandbox_belong_to_root_for_all_who_would_look_into_them(isolating: Sandbox) -> None:
    """The kernel gives the files of a process that may not be dumped to root; else a job, of the same user, could open
    them, where nothing else forbids it."""
    if not has_namespaces(isolating.level):
        pytest.skip("jobs have another user, or see no /proc")
    thread = threading.Thread(target=isolating.run, args=(Job("import time\ntime.sleep(0.3)", seconds=PATIENCE),))
    thread.start()
    owners = []
    for pid in zygotes():
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(FileNotFoundError):  # the job may have ended
                owners.append(Path(f"/proc/{process.pid}/environ").stat().st_uid)
    thread.join()
    assert len(owners) >= 3 and set(owners) == {0}


@pytest.mark.parametrize("level", ISOLATING)
def test_packages_that_everybody_may_write_are_only_read(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        module = Path(folder) / "open_to_all.py"
        module.write_text("x = 7\n")
        for path, mode in ((Path(folder), 0o777), (module, 0o666)):
            path.chmod(mode)
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": folder, "platlib": folder})
        code = """
import os, open_to_all
print(open_to_all.x)
path = open_to_all.__file__
for change in (lambda: open(path, 'a'), lambda: open(path, 'w'), lambda: open(path + 'new', 'w'),
               lambda: os.remove(path), lambda: os.rename(path, path + 'new'), lambda: os.mkdir(path + 'new')):
    try:
        change()
        print('done')
    except OSError:
        pass
"""
        with sandbox_or_skip(level) as made:
            assert made.run(Job(code, seconds=PATIENCE)).stdout == b"7\n"
        assert module.read_text() == "x = 7\n" and os.listdir(folder) == [module.name]  # noqa: PTH208


ARGUMENTS = """
import ctypes, fcntl, os, resource
libc = ctypes.CDLL(None, use_errno=True)
with open('mine', 'w') as file:
    file.write('kept')
def refused(what, result):
    if result != -1 or ctypes.get_errno() != 1:
        print(what, result, ctypes.get_errno())
refused('empty by reading', libc.open(b'mine', os.O_RDONLY | os.O_TRUNC))
refused('empty by reading', libc.openat(-100, b'mine', os.O_RDONLY | os.O_TRUNC))
here = os.open('mine', os.O_RDONLY)
for command in (8, 10, 15, 1024, 1026, 1033):  # owner, signal, owner, lease, notify, seals
    refused(f'fcntl {command}', libc.fcntl(here, command, os.getppid()))
for request in (0x5412, 0x5452, 0x540E, 0x40086602):  # type for others, signals by a file, a terminal, a file's flags
    refused(f'ioctl {request:x}', libc.ioctl(here, request, ctypes.create_string_buffer(64)))
for option in (1, 4, 8, 22, 23, 35, 36):  # the tie to the parent's death among them
    refused(f'prctl {option}', libc.prctl(option, 0, 0, 0, 0))
for pid in (os.getppid(), 1, 2):
    if pid != os.getpid():
        try:
            resource.prlimit(pid, resource.RLIMIT_NOFILE)
            print('limits of', pid)
        except PermissionError:
            pass
for number in (39, 59, 57):
    if libc.syscall(0x40000000 + number) != -1 or ctypes.get_errno() != 38:  # x32
        print('x32', number, ctypes.get_errno())
print(open('mine').read())
"""


@INTEL
def test_calls_that_are_needed_are_not_given_with_any_argument(isolating: Sandbox) -> None:
    assert attack(isolating, ARGUMENTS).stdout == b"kept\n"


REFUSED = [
    # execve, execveat, fork, vfork; socket, connect, accept, sendmsg, bind, listen, accept4, recvmmsg, sendmmsg
    59, 322, 57, 58, 41, 42, 43, 46, 49, 50, 288, 299, 307,
    # chmod, fchmod, chown, fchown, lchown, utime, utimes, utimensat, fchownat, fchmodat; the three sets of setxattr
    90, 91, 92, 93, 94, 132, 235, 280, 260, 268, 188, 189, 190,
    # truncate, link, symlink, mknod, linkat, symlinkat, mknodat, memfd_create, fallocate's folder: creat
    76, 86, 88, 133, 265, 266, 259, 319, 85,
    # setpgid, setsid, setuid, setgid, setresuid, setresgid, setgroups, capset, personality, setpriority, seccomp
    109, 112, 105, 106, 117, 119, 116, 126, 135, 141, 317,
    # shmget, semget, msgget, mq_open, inotify_init1, fanotify_init; rt_sigqueueinfo, rt_tgsigqueueinfo, tkill
    29, 64, 68, 240, 294, 300, 129, 297, 200,
    # sched_setaffinity, sched_setscheduler, ioprio_set, swapon, syslog, settimeofday, sethostname, quotactl
    203, 144, 251, 167, 103, 164, 170, 179,
]  # fmt: skip
NEWER = [424, 426, 427, 434, 435, 444, 447]
"""pidfd_send_signal, io_uring's two others, pidfd_open, clone3, Landlock's first, memfd_secret"""
FATAL = [101, 155, 161, 165, 166, 169, 175, 246, 248, 250, 272, 298, 304, 308, 310, 311, 312, 321, 323, 425, 430, 438]
"""ptrace, pivot_root, chroot, mount, umount2, reboot, init_module, kexec_load, add_key, keyctl, unshare,
perf_event_open, open_by_handle_at, setns, process_vm_readv and writev, kcmp, bpf, userfaultfd, io_uring_setup, fsopen,
pidfd_getfd"""


@INTEL
def test_no_other_call_is_given(isolating: Sandbox) -> None:
    code = f"""
libc = ctypes.CDLL(None, use_errno=True)
for number, errno in [(n, 1) for n in {REFUSED}] + [(n, 38) for n in {NEWER}]:
    result = libc.syscall(number, *[ctypes.c_long(-1)] * 6)
    if (result, ctypes.get_errno()) != (-1, errno):
        print(number, result, ctypes.get_errno())
print('end')
"""
    assert attack(isolating, code).stdout == b"end\n"
    for number in FATAL if isolating.level != BUBBLEWRAP else FATAL[:3]:  # the same filter, started more slowly
        code = f"import ctypes\nctypes.CDLL(None).syscall({number}, *[ctypes.c_long(-1)] * 6)"
        assert isolating.run(Job(code, seconds=PATIENCE)).status == "killed", number


OLD_CALL = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # mov eax, 20 (getpid); int 0x80; ret
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(call(), flush=True)
"""


@INTEL
def test_calls_by_the_numbers_of_32_bits_kill(isolating: Sandbox) -> None:
    """There 102 is all of the network, and to the filter it would be getuid."""
    plain = subprocess.run([sys.executable, "-c", OLD_CALL], capture_output=True)
    if plain.returncode:
        pytest.skip("the kernel has no such calls")
    outcome = attack(isolating, OLD_CALL)
    assert (outcome.status, outcome.stdout) == ("killed", b"")


ALONE = """
import ctypes, os, socket, sys
from branchmerge.evaluation.sandbox import kernel
readable, path, port, pid, writable = sys.argv[1:]
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
reading = kernel.ACCESS_FS_READ_FILE | kernel.ACCESS_FS_READ_DIR
client = socket.socket()
everything = reading | kernel.ACCESS_FS_WRITE_FILE | kernel.ACCESS_FS_TRUNCATE | kernel.ACCESS_FS_MAKE_REG
kernel.landlock(kernel.landlock_ruleset([(readable, reading), (writable, everything), ('/no/such/path', reading)]))
def tried(call):
    try:
        call()
        return 'done'
    except PermissionError:
        return 'refused'
print(kernel.landlock_abi(), tried(lambda: open(path).close()), tried(lambda: open(path, 'a').close()),
      tried(lambda: open(writable + '/new', 'w').close()), tried(lambda: os.listdir('/')),
      tried(lambda: os.truncate(path, 0)), tried(lambda: client.connect(('127.0.0.1', int(port)))),
      tried(lambda: os.kill(int(pid), 0)))
"""


def test_landlock_alone_takes_files_network_and_signals(tmp_path: Path) -> None:
    """Without the filter, which would refuse most of it first."""
    for name in ("readable", "writable"):
        (tmp_path / name).mkdir()
    file = tmp_path / "readable" / "file"
    file.write_text("precious")
    folders = [str(tmp_path / "readable"), str(file)]
    with socket.create_server(("127.0.0.1", 0)) as server, subprocess.Popen(["sleep", "100"]) as bystander:
        given = [*folders, str(server.getsockname()[1]), str(bystander.pid), str(tmp_path / "writable")]
        ran = subprocess.run([sys.executable, "-c", ALONE, *given], capture_output=True, text=True)
        bystander.kill()
    if ran.returncode and "landlock_create_ruleset" in ran.stderr:
        pytest.skip("the kernel has no Landlock")
    version, *found = ran.stdout.split()
    since = [0, 1, 0, 1, 3, 4, 6]  # the version from which on it is refused; 0: never
    names = ["read", "write", "write in its own", "list all", "truncate", "connect", "signal"]
    expected = ["refused" if first and int(version) >= first else "done" for first in since]
    assert dict(zip(names, found, strict=True)) == dict(zip(names, expected, strict=True)), ran.stderr
    assert int(version) < 3 or file.read_text() == "precious"


@pytest.mark.parametrize("seconds", [PATIENCE, 0.5])
def test_what_a_program_without_isolation_started_ends_with_it(seconds: float) -> None:
    name = f"bm-{secrets.token_hex(5)}"
    code = f"{naming(name)}import os, time\nif os.fork() == 0:\n    time.sleep(1000)\n"
    with sandbox_or_skip(UNSAFE) as made:
        outcome = made.run(Job(code + ("" if seconds > 1 else "time.sleep(1000)"), seconds=seconds))
        assert outcome.status == ("ok" if seconds > 1 else "timeout")
        assert eventually(lambda: not named(name))


def test_a_program_that_only_trickles_is_waited_for_no_longer_than_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is at work at every look, and would be for five times its time."""
    monkeypatch.setattr(zygote, "PATIENCE", 0.5)
    code = """
import time
while True:
    end = time.process_time() + 0.01
    while time.process_time() < end:
        pass
    time.sleep(0.05)
"""
    reading, writing = os.pipe()
    begin = time.monotonic()
    with subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True) as job:
        how, _ = zygote._wait(job.pid, reading, begin, 0.8)
    os.close(reading)
    os.close(writing)
    assert how == zygote.OUT_OF_TIME
    assert 1.3 <= time.monotonic() - begin < 3.5
