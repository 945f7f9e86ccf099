"""A job leaves nothing to the next one: the process that forks jobs is reused only while nothing in it changed."""

import re
import secrets
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from attacking import ISOLATING, PATIENCE, attack, eventually, named, naming, sandbox_or_skip, zygotes

from branchmerge.evaluation.sandbox import Job, Sandbox
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
