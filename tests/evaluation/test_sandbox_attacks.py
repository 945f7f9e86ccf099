"""Programs that mean harm, at every level that isolates: processes, network, memory, time; deaths of the sandbox.

What they do to files is in test_sandbox_files.
"""

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from attacking import ISOLATING, PATIENCE, attack, eventually, named, naming, sandbox_or_skip, zygotes

from branchmerge.evaluation.sandbox import Job, Outcome, Sandbox
from branchmerge.evaluation.sandbox.isolation import BUBBLEWRAP, has_namespaces


@pytest.fixture(scope="module", params=ISOLATING)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_or_skip(request.param) as made:
        yield made


@pytest.fixture(scope="module", params=ISOLATING)
def single(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Of one worker, so that a job has the keeper of the job before, if that may have another."""
    sandbox_or_skip(request.param).close()
    with Sandbox(request.param, workers=1) as made:
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


SCAN = """
import ctypes, os
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
reading, writing = os.pipe()
control = bytes(bytearray([99, 111, 110, 116]) + b'rol-' + str(6 * 7).encode())
def pages(around, reach):
    begin = max(around - reach, 0) & ~4095
    for address in range(begin, begin + 2 * reach, 4096):
        if libc.write(writing, ctypes.c_void_p(address), 4096) == 4096:  # a page that is not there gives an error
            yield os.read(reading, 4096)
found = set()
places = [libc.sbrk(0), id(object()), id(control), id(os), ctypes.addressof(ctypes.create_string_buffer(1 << 16))]
for place in places:
    for page in pages(place, 16 << 20):
        for first, second in (('cont', 'rol-42'), (HEAD, TAIL)):
            at = page.find(first.encode())
            while at >= 0:
                if page[at + len(first):at + len(first) + len(second)] == second.encode():
                    found.add(first)
                at = page.find(first.encode(), at + 1)
print(sorted(found))
"""


def test_nothing_of_an_earlier_job_is_in_memory(sandbox: Sandbox) -> None:
    head, tail = secrets.token_hex(8), secrets.token_hex(8)
    job = Job(f"answer = '{head}{tail}'\nprint(input(), answer * 1000)", stdin=f"{head}{tail}\n", seconds=PATIENCE)
    assert f"{head}{tail}".encode() in sandbox.run(job).stdout
    outcome = sandbox.run(Job(f"HEAD, TAIL = '{head}', '{tail}'\n{SCAN}", seconds=2 * PATIENCE))
    assert outcome.stdout == b"['cont']\n"  # finds what it planted itself, and only that


SABOTAGE = {
    "kill": """
for pid in (os.getppid(), 1, 0, -1):
    for kill in (os.kill, os.killpg, lambda pid, number: signal.pidfd_send_signal(os.pidfd_open(pid), number)):
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD):
            try:
                kill(pid, number)
            except (OSError, OverflowError):
                pass
""",
    "trace": "libc.ptrace(16, os.getppid(), 0, 0)",
    "write to its memory": "libc.process_vm_writev(os.getppid(), ctypes.create_string_buffer(16), 1, None, 0, 0)",
    "write to all files": """
for number in range(3, 256):
    try:
        os.write(number, bytes(13))
    except OSError:
        pass
""",
    "change its frames": """
frame = sys._getframe()
while frame:
    for name in ('_wait', '_run', '_receive', 'os', 'random', 'program', 'isolation'):
        frame.f_globals[name] = None
    frame = frame.f_back
""",
    "change modules": """
for module in [module for module in sys.modules.values() if module]:
    for name in [name for name in vars(module) if name not in ('os', 'sys', '_exit')]:
        try:
            setattr(module, name, None)
        except Exception:
            pass
os._exit(0)
""",
    "leave threads": "for _ in range(9):\n    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
    "leave a file": "open('left', 'w').write('x')",
    "leave no file": "open('left', 'w').close()\nos.remove('left')",
    "leave a file without a name": "os.write(os.open('.', os.O_TMPFILE | os.O_RDWR), bytes(1 << 20))",
    "leave a folder": "os.mkdir('left')\nos.chdir('left')",
    "close its rights": "libc.fchmod(os.open('.', os.O_RDONLY), 0)\nos.umask(0o777)",
    "lock a library": "fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX)",
    "take its own limits away": "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))",
    "run out of time": "signal.alarm(0)\ntime.sleep(1000)",
    "run out of memory": "x = bytearray(1 << 40)",
    "die": "os.abort()",
}
"""What a job may try against the keeper, which runs the next job too, or against that job."""
LOOK = """
import builtins, fcntl, json, os, random, resource, sys, threading
fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX)  # free at once, other test processes aside
print(os.listdir(), os.getcwd(), os.umask(0), sorted(os.environ), threading.active_count(), sys.argv, sorted(globals()))
print(sorted(sys.modules), sorted(vars(os)))
print([resource.getrlimit(kind) for kind in range(16)], oct(os.stat('.').st_mode), os.statvfs('.').f_bfree, input())
random.seed(1)
print(random.random(), json.dumps([len(vars(builtins))]))
"""


@pytest.fixture(scope="module")
def unspoilt(single: Sandbox) -> str:
    """What the first job of a sandbox finds."""
    with Sandbox(single.level, workers=1) as fresh:
        return _looked(fresh)


@pytest.mark.parametrize("name", SABOTAGE)
def test_next_job_of_the_same_keeper_finds_nothing_changed(single: Sandbox, unspoilt: str, name: str) -> None:
    code = "import ctypes, fcntl, os, resource, signal, sys, threading, time\nlibc = ctypes.CDLL(None)\n"
    attack(single, code + SABOTAGE[name], seconds=2.0)
    assert _looked(single) == unspoilt


def _looked(sandbox: Sandbox) -> str:
    """What a job finds, less what changes on its own: where its folder is and what is free around it."""
    outcome = sandbox.run(Job(LOOK, stdin="given\n", seconds=PATIENCE))
    assert (outcome.status, outcome.stderr) == ("ok", ""), outcome
    said = outcome.stdout.decode()
    if not has_namespaces(sandbox.level):
        said = re.sub(r"/\S*branchmerge-sandbox-\S+", "folder", said)
        said = re.sub(r"(0o40700) \d+", r"\1", said)
    return said


@pytest.mark.parametrize(
    ("code", "again"),
    [
        ("print(1)", True),
        ("1 / 0", True),
        ("import os\nos.abort()", True),
        ("while True: pass", True),
        ("open('left', 'w').close()", False),
        ("import os\nopen('left', 'w').close()\nos.remove('left')", False),
        ("import os\nos.listdir()", False),
    ],
)
def test_keeper_whose_folder_was_touched_is_replaced(single: Sandbox, code: str, again: bool) -> None:
    keeper = _keeper(single)
    single.run(Job(code, seconds=1.0))
    # bwrap gives each job a folder of its own.
    assert (_keeper(single) == keeper) == (again or single.level == BUBBLEWRAP)


def _keeper(single: Sandbox) -> int:
    """The process from which the sandbox will fork its next job."""
    name = f"bm-{secrets.token_hex(5)}"
    thread = threading.Thread(target=single.run, args=(Job(f"{naming(name)}\nimport time\ntime.sleep(1)"),))
    thread.start()
    assert eventually(lambda: bool(named(name)))
    parents = named(name)[0].parents()
    thread.join()
    return next(child.pid for child, parent in pairwise(parents) if parent.pid in zygotes())


CLIENT = """
import sys, threading
from branchmerge.evaluation.sandbox import Job, Sandbox
sandbox = Sandbox(sys.argv[1], workers=2)
jobs = [threading.Thread(target=sandbox.run, args=(Job(sys.argv[2], seconds=1000),)) for _ in range(2)]
for job in jobs:
    job.start()
"""


def test_all_die_with_the_client(sandbox: Sandbox) -> None:
    name = f"bm-{secrets.token_hex(5)}"
    program = f"{naming(name)}\nimport time\ntime.sleep(1000)"
    client = subprocess.Popen([sys.executable, "-c", CLIENT, sandbox.level, program])
    assert eventually(lambda: len(named(name)) == 2)
    family = psutil.Process(client.pid).children(recursive=True)
    folders = {process.cwd() for process in named(name)} if not has_namespaces(sandbox.level) else set()
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert eventually(lambda: not any(process.is_running() for process in family)), family
    assert not named(name)
    if sandbox.level != BUBBLEWRAP:  # there the path is one inside
        assert eventually(lambda: not any(Path(folder).parent.exists() for folder in folders)), folders


def test_dead_zygote_is_replaced_and_its_job_run_again(sandbox: Sandbox) -> None:
    name = f"bm-{secrets.token_hex(5)}"
    outcomes: list[Outcome] = []
    job = Job(f"{naming(name)}\nimport time\ntime.sleep(3)\nprint('done')", seconds=PATIENCE)
    thread = threading.Thread(target=lambda: outcomes.append(sandbox.run(job)))
    before = zygotes()
    thread.start()
    assert eventually(lambda: bool(named(name)))
    first = {process.pid for process in named(name)}
    os.kill(before.pop(), signal.SIGKILL)
    assert eventually(lambda: not first & {process.pid for process in named(name)})
    thread.join()
    assert [(outcome.status, outcome.stdout) for outcome in outcomes] == [("ok", b"done\n")]
    assert sandbox.run(Job("print(1)", seconds=PATIENCE)).stdout == b"1\n"


def test_job_whose_zygotes_die_twice_is_killed(sandbox: Sandbox) -> None:
    name = f"bm-{secrets.token_hex(5)}"
    outcomes: list[Outcome] = []
    job = Job(f"{naming(name)}\nimport time\ntime.sleep(1000)", seconds=1000)
    thread = threading.Thread(target=lambda: outcomes.append(sandbox.run(job)))
    thread.start()
    seen: set[int] = set()
    for _ in range(2):
        assert eventually(lambda known=frozenset(seen): bool({process.pid for process in named(name)} - known))
        seen |= {process.pid for process in named(name)}
        for pid in zygotes():
            os.kill(pid, signal.SIGKILL)
    thread.join(PATIENCE)
    assert [outcome.status for outcome in outcomes] == ["killed"]
    assert sandbox.run(Job("print(1)", seconds=PATIENCE)).stdout == b"1\n"
