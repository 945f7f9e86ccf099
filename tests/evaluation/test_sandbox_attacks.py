"""Hostile programs at every isolating level of the sandbox: processes, network, memory, time, output.

Attacks on files are in test_sandbox_files.py, attacks on the next job in test_sandbox_reuse.py.
"""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator

import psutil
import pytest
from attacking import ISOLATING, PATIENCE, attack, eventually, sandbox_or_skip, zygotes

from branchmerge.evaluation.sandbox import Job, Sandbox
from branchmerge.evaluation.sandbox.isolation import has_namespaces


@pytest.fixture(scope="module", params=ISOLATING)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_or_skip(request.param) as made:
        yield made


def test_name_finds_a_process(sandbox: Sandbox) -> None:
    """The other tests would pass for nothing if names didn't work."""
    thread = threading.Thread(target=attack, args=(sandbox, "import time\ntime.sleep(3)"))
    thread.start()
    assert eventually(lambda: any(p.name().startswith("bm-") for p in psutil.Process().children(recursive=True)))
    thread.join()


@pytest.mark.parametrize(
    "start",
    [
        "os.fork()",
        "subprocess.Popen(['sleep', '100'])",
        "os.posix_spawn('/bin/sleep', ['sleep', '100'], {})",
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(100,)).start()",
        "os.posix_spawn(sys.executable or '/bin/sh', ['x'], {})",
        "check(libc.vfork())",
        "check(libc.syscall(*numbers, 17, 0, 0, 0, 0))",
        "check(libc.syscall(435, bytes(64) + (17).to_bytes(8, 'little') + bytes(16), 88))",
    ],
)
def test_fork_bomb_starts_no_process(sandbox: Sandbox, start: str) -> None:
    code = f"""
import multiprocessing, os, platform, subprocess, sys, time
libc = ctypes.CDLL(None)
numbers = [56] if platform.machine() == 'x86_64' else [220]
def check(result):
    if result < 0:
        raise OSError
begun = 0
for _ in range(50):
    try:
        {start}
        begun += 1
    except OSError:
        pass
print(begun, 'begun')
"""
    assert attack(sandbox, code).stdout == b"0 begun\n"


def test_daemon_does_not_survive(sandbox: Sandbox) -> None:
    code = """
import os, time
try:
    os.setsid()
except OSError:
    pass
for _ in range(2):
    try:
        if os.fork():
            os._exit(0)
        os.setsid()
    except OSError:
        pass
time.sleep(100)
"""
    assert attack(sandbox, code, seconds=1.0).status == "timeout"


def test_threads_are_bounded_and_end(sandbox: Sandbox) -> None:
    code = """
import os, threading, time
threading.stack_size(32768)
count = 0
try:
    while count < 20000:
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        count += 1
except (RuntimeError, MemoryError):
    pass
os.write(1, str(count).encode())
time.sleep(100)
"""
    outcome = attack(sandbox, code, seconds=4.0)
    assert outcome.status == "timeout"
    if has_namespaces(sandbox.level):
        assert 100 < int(outcome.stdout) < 600


@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_network_is_out_of_reach(sandbox: Sandbox, kind: str) -> None:
    with socket.socket(socket.AF_INET, getattr(socket, kind)) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        if kind == "SOCK_STREAM":
            server.listen()
        code = f"""
import socket
try:
    with socket.socket(socket.AF_INET, socket.{kind}) as client:
        client.connect(('127.0.0.1', {server.getsockname()[1]}))
        client.send(b'hello')
    print('connected')
except OSError as error:
    print(type(error).__name__)
"""
        assert attack(sandbox, code).stdout == b"PermissionError\n"
        with pytest.raises(BlockingIOError):
            _ = server.accept() if kind == "SOCK_STREAM" else server.recv(10)


def test_three_gigabytes_are_refused(sandbox: Sandbox) -> None:
    assert attack(sandbox, "x = bytearray(3 << 30)", memory_bytes=1 << 30).status == "memory"
    code = "import mmap\ntry:\n    mmap.mmap(-1, 3 << 30)\nexcept (OSError, MemoryError):\n    print('refused')\n"
    assert attack(sandbox, code, memory_bytes=1 << 30).stdout == b"refused\n"


def test_files_are_bounded(sandbox: Sandbox) -> None:
    code = """
for number in range(40):
    with open(f'file{number}', 'wb') as file:
        for _ in range(32):
            file.write(bytes(1 << 20))
"""
    outcome = attack(sandbox, code)
    assert outcome.status == "error"
    assert "OSError" in outcome.stderr


def test_flood_of_output_ends_the_job(sandbox: Sandbox) -> None:
    outcome = attack(sandbox, "while True:\n    print('x' * 1000)", output_bytes=100_000)
    assert outcome.status == "output"
    assert outcome.stdout == (b"x" * 1000 + b"\n") * 99 + b"x" * 901
    assert outcome.seconds < PATIENCE


def test_flood_of_errors_is_cut(sandbox: Sandbox) -> None:
    code = "import sys\nfor n in range(200_000):\n    print(n, 'x' * 50, file=sys.stderr)\n"
    outcome = attack(sandbox, code)
    assert outcome.status == "ok"
    assert len(outcome.stderr) <= 2048
    assert outcome.stderr.endswith(f"199999 {'x' * 50}\n")


@pytest.mark.parametrize("code", ["while True:\n    pass", "import time\ntime.sleep(1000)", "input()\nopen(0).read()"])
def test_endless_program_is_stopped(sandbox: Sandbox, code: str) -> None:
    code = f"import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nr, w = os.pipe()\nos.dup2(r, 0)\n{code}"
    outcome = attack(sandbox, code, seconds=1.0)
    assert outcome.status == "timeout"
    assert 1.0 <= outcome.seconds < PATIENCE


@pytest.mark.parametrize(
    "kill",
    ["os.kill(pid, 9)", "os.killpg(pid, 9)", "signal.pidfd_send_signal(os.pidfd_open(pid), 9)"],
)
def test_others_cannot_be_killed(sandbox: Sandbox, kill: str) -> None:
    with subprocess.Popen(["sleep", "100"]) as bystander:
        pids = [os.getpid(), *zygotes(), bystander.pid]
        code = f"""
import os, signal
for pid in [*{pids}, os.getppid(), 1, -1, 0]:
    if pid != os.getpid():
        try:
            {kill}
            print('sent', pid)
        except OSError:
            pass
"""
        outcome = sandbox.run(Job(code, seconds=PATIENCE))
        assert bystander.poll() is None
        assert outcome.stdout == b""
        assert zygotes() >= {*pids} - {os.getpid()}
        bystander.kill()


def test_others_cannot_be_traced(sandbox: Sandbox) -> None:
    for pid in zygotes() | {os.getpid()}:
        code = f"import ctypes\nprint(ctypes.CDLL(None).ptrace(16, {pid}, 0, 0), flush=True)"
        outcome = attack(sandbox, code)
        assert (outcome.status, outcome.stdout) == ("killed", b"")


@pytest.mark.parametrize("call", ["unshare(0x10000000)", "chroot(b'.')", "mount(b'x', b'.', b'tmpfs', 0, 0)"])
def test_system_calls_of_no_use_kill(sandbox: Sandbox, call: str) -> None:
    assert attack(sandbox, f"import ctypes\nctypes.CDLL(None).{call}").status == "killed"


def test_limits_cannot_be_raised(sandbox: Sandbox) -> None:
    code = """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print('raised', kind)
    except (ValueError, OSError):
        pass
"""
    assert attack(sandbox, code).stdout == b""
