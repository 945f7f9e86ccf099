"""What programs may rely on, how their ends are told, and the life of a sandbox."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacking import sandbox_or_skip

from branchmerge.errors import UserError
from branchmerge.evaluation.sandbox import Job, Sandbox, isolation, shared, zygote
from branchmerge.evaluation.sandbox.isolation import BUBBLEWRAP, LEVELS, UNSAFE

SECONDS = 60.0
"""Enough on a loaded machine; nothing that ends by itself takes a tenth of it."""

TOGETHER = """
import threading
barrier = threading.Barrier(33)
for _ in range(32):
    threading.Thread(target=barrier.wait).start()
barrier.wait()
print("met")
"""
"""Threads that run all at once."""


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_or_skip(request.param) as made:
        yield made


@pytest.mark.parametrize(
    ("program", "given", "printed"),
    [
        ("print(int(input()) + int(input()))", "20\n22\n", "42\n"),
        ("import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1])", "ab\ncd", "ba\ndc\n"),
        ("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))", "1 2 3\n", "6\n"),
        ("print(open(0).read().upper())", "abc", "ABC\n"),
        ("import sys\nprint(sys.stdin.readline(), sys.stdin.read(), sep='|')", "a\nb\n", "a\n|b\n\n"),
        ("import os\nprint(os.read(0, 3))", "abcdef", "b'abc'\n"),
        ("try:\n    input()\nexcept EOFError:\n    print('end')", "", "end\n"),
        ("print(input())", "grüße 你好\n", "grüße 你好\n"),
        ("import sys\nsys.stdout.buffer.write(b'\\xff')\nsys.stdout.write('x')", "", b"\xffx"),
        ("count = 0\ndef add():\n    global count\n    count += 1\nadd()\nprint(count)", "", "1\n"),
        ("def main():\n    print(__name__)\nif __name__ == '__main__':\n    main()", "", "__main__\n"),
        ("print(1)\nexit()\nprint(2)", "", "1\n"),
        ("import sys\nprint(1)\nsys.exit(0)", "", "1\n"),
        ("import sys\nprint(1, flush=True)\nsys.exit()", "", "1\n"),
        ("import atexit\natexit.register(print, 'bye')\nprint('hi')", "", "hi\nbye\n"),
        ("import threading\nthreading.Thread(target=lambda: print('in a thread')).start()", "", "in a thread\n"),
        (TOGETHER, "", "met\n"),
        ("import sys\nsys.setrecursionlimit(10**6)\nd = lambda n: n and 1 + d(n - 1)\nprint(d(10**5))", "", "100000\n"),
        (
            "import sys, functools\nsys.setrecursionlimit(10**6)\n@functools.lru_cache(None)\n"
            "def f(n):\n    return n and 1 + f(n - 1)\nprint(f(100_000))",
            "",
            "100000\n",
        ),
        ("open('x', 'w').write('kept')\nimport os\nprint(os.listdir(), open('x').read())", "", "['x'] kept\n"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f:\n    print(f.write(b'abc'))", "", "3\n"),
        ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    print('a')\nasyncio.run(f())", "", "a\n"),
        ("import zoneinfo\nprint(zoneinfo.ZoneInfo('Europe/Paris').key)", "", "Europe/Paris\n"),
        ("import sqlite3, hashlib, uuid, secrets, inspect, csv\nprint(len(secrets.token_hex(4)))", "", "8\n"),
        ("import random\nrandom.seed(1)\nprint(random.randint(1, 100))", "", "18\n"),
        ("import sys\nprint(sys.argv, __file__)", "", "['program.py'] program.py\n"),
        ("# -*- coding: latin-1 -*-\nprint('ü')", "", "ü\n"),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\nprint(A())", "", "A(x=1)\n"),
        ("from __future__ import annotations\ndef f(x: undefined): pass\nprint(f.__annotations__)", "",
         "{'x': 'undefined'}\n"),
    ],
)  # fmt: skip
def test_program_prints(sandbox: Sandbox, program: str, given: str, printed: str | bytes) -> None:
    outcome = sandbox.run(Job(program, stdin=given, seconds=SECONDS))
    expected = printed.encode() if isinstance(printed, str) else printed
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", expected, "")


def test_numpy_works(sandbox: Sandbox) -> None:
    program = "import numpy as np\nprint(np.linalg.norm(np.ones((100, 100)) @ np.ones(100)))"
    outcome = sandbox.run(Job(program, seconds=SECONDS))
    assert (outcome.status, outcome.stdout) == ("ok", b"1000.0\n"), outcome.stderr


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("1 / 0", "error"),
        ("def f(:", "error"),
        ("raise KeyboardInterrupt", "error"),
        ("import sys\nsys.exit(3)", "error"),
        ("import sys\nsys.exit('words')", "error"),
        ("import os\nos._exit(9)", "error"),
        ("import os\nos._exit(0)", "ok"),
        ("\ud800", "error"),
        ("x = '\0'", "error"),
        ("def f():\n    f()\nf()", "error"),
        ("class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E", "error"),
        ("import no_such_module", "error"),
        ("x = []\nwhile True:\n    x.append(bytes(1 << 20))", "memory"),
        ("import os\nos.abort()", "killed"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", "killed"),
        ("import signal, time\nsignal.alarm(1)\ntime.sleep(50)", "killed"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
    ],
)
def test_how_a_program_ended(sandbox: Sandbox, program: str, status: str) -> None:
    outcome = sandbox.run(Job(program, seconds=SECONDS, memory_bytes=1 << 30))
    assert outcome.status == status, outcome
    assert outcome.seconds < SECONDS


def test_what_was_printed_before_the_end_is_kept(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Job("print('before')\nx = 1\nx.nothing", seconds=SECONDS))
    assert (outcome.status, outcome.stdout) == ("error", b"before\n")
    assert outcome.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert '"program.py", line 3' in outcome.stderr
    assert "x.nothing" in outcome.stderr
    assert "zygote" not in outcome.stderr
    assert sandbox.run(Job("print('before', flush=True)\nwhile True: pass", seconds=2.0)).stdout == b"before\n"


def test_output_up_to_the_limit_is_no_flood(sandbox: Sandbox) -> None:
    fits = sandbox.run(Job("print('x' * 99_999)", output_bytes=100_000, seconds=SECONDS))
    assert (fits.status, len(fits.stdout)) == ("ok", 100_000)
    more = sandbox.run(Job("print('x' * 100_000)", output_bytes=100_000, seconds=SECONDS))
    assert (more.status, len(more.stdout)) == ("output", 100_000)


def test_memory_limit_is_what_it_says(sandbox: Sandbox) -> None:
    program = "x = bytearray(300 << 20)"
    assert sandbox.run(Job(program, seconds=SECONDS, memory_bytes=1 << 30)).status == "ok"
    assert sandbox.run(Job(program, seconds=SECONDS, memory_bytes=256 << 20)).status == "memory"


def test_input_larger_than_a_pipe_that_nobody_reads(sandbox: Sandbox) -> None:
    assert sandbox.run(Job("print('done')", stdin="x" * (8 << 20), seconds=SECONDS)).stdout == b"done\n"


def test_jobs_do_not_see_each_other(sandbox: Sandbox) -> None:
    first = "import os, builtins, json\nbuiltins.left = json.left = 1\nos.environ['LEFT'] = '1'\nopen('left', 'w')"
    second = (
        "import os, builtins, json\nprint(hasattr(builtins, 'left') or hasattr(json, 'left') or 'LEFT' in os.environ)\n"
    )
    assert sandbox.run(Job(first, seconds=SECONDS)).status == "ok"
    outcome = sandbox.run(Job(second + "print(os.listdir())", seconds=SECONDS))
    assert outcome.stdout == b"False\n[]\n"


def test_order_of_a_set_is_the_same_every_time() -> None:
    job = Job("print({str(n) for n in range(100)})", seconds=SECONDS)
    printed = set()
    for _ in range(3):
        with Sandbox() as sandbox:
            printed.add(sandbox.run(job).stdout)
    assert len(printed) == 1


def test_random_numbers_are_not(sandbox: Sandbox) -> None:
    job = Job("import random\nprint(random.random())", seconds=SECONDS)
    assert sandbox.run(job).stdout != sandbox.run(job).stdout


def test_environment_is_empty_and_the_package_out_of_sight(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRANCHMERGE_TEST_SECRET", "hunter2")
    program = "import os, sys\nprint(sorted(os.environ), [name for name in sys.modules if 'branchmerge' in name])"
    assert sandbox.run(Job(program, seconds=SECONDS)).stdout == b"['OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'] []\n"
    if sandbox.level != UNSAFE:
        assert sandbox.run(Job("import branchmerge.evaluation.graders", seconds=SECONDS)).status == "error"


def test_many_threads_run_jobs_at_once(sandbox: Sandbox) -> None:
    outputs: dict[int, bytes] = {}

    def work(number: int) -> None:
        for step in range(3):
            outputs[3 * number + step] = sandbox.run(
                Job(f"print(int(input()) + {step})", stdin=f"{3 * number}\n", seconds=SECONDS)
            ).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {number: f"{number}\n".encode() for number in range(48)}


def test_workers_are_the_number_of_jobs_at_once() -> None:
    with Sandbox(workers=4) as sandbox:
        begin = time.monotonic()
        threads = [
            threading.Thread(target=sandbox.run, args=(Job("import time\ntime.sleep(50)", seconds=3.0),))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - begin < 10


def test_deadline_is_kept(sandbox: Sandbox) -> None:
    outcome = sandbox.run(Job("import time\ntime.sleep(100)", seconds=0.5 if sandbox.level != BUBBLEWRAP else 2.0))
    assert outcome.status == "timeout"
    assert outcome.seconds < 10


def test_folder_of_a_job_is_removed(sandbox: Sandbox) -> None:
    program = "import os\nopen('left', 'w').write('x')\nprint(os.getcwd())\nos.chmod('.', 0)"
    folder = sandbox.run(Job(program, seconds=SECONDS)).stdout.decode().strip()
    assert folder.startswith("/")
    assert not Path(folder).exists()


def test_closed_sandbox_leaves_nothing() -> None:
    for level in (isolation.NO_NAMESPACES, UNSAFE):
        try:
            sandbox = Sandbox(level)
        except UserError:
            continue
        with sandbox:
            folder = Path(sandbox.run(Job("import os\nprint(os.getcwd())", seconds=SECONDS)).stdout.decode().strip())
            assert folder.parent.exists()
        assert not folder.parent.exists()
        with pytest.raises(RuntimeError, match="closed"):
            sandbox.run(Job("print(1)"))


def test_no_file_descriptors_are_left_open(sandbox: Sandbox) -> None:
    descriptors = Path("/proc/self/fd")
    sandbox.run(Job("print(1)", seconds=SECONDS))
    before = len(list(descriptors.iterdir()))
    for program in ("print(1)", "1 / 0", "import os\nos.abort()"):
        sandbox.run(Job(program, seconds=SECONDS))
    assert len(list(descriptors.iterdir())) == before


def test_job_gets_three_descriptors(sandbox: Sandbox) -> None:
    program = """
import os
for number in range(1024):
    try:
        os.fstat(number)
        print(number)
    except OSError:
        pass
"""
    assert sandbox.run(Job(program, seconds=SECONDS)).stdout == b"0\n1\n2\n"


def test_auto_is_never_unsafe() -> None:
    with Sandbox() as sandbox:
        assert sandbox.level in LEVELS
        assert sandbox.level != UNSAFE


def test_unknown_level_is_refused() -> None:
    with pytest.raises(UserError, match="no sandbox level 'docker'; the levels are auto, namespaces"):
        Sandbox("docker")


def test_without_any_isolation_programs_are_refused() -> None:
    code = (
        REFUSING
        + "\nfrom branchmerge.evaluation.sandbox import Sandbox\n"
        + (
            "try:\n    print(Sandbox().level)\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
            "print(Sandbox('unsafe').run(__import__('branchmerge.evaluation.sandbox').evaluation.sandbox.Job('print(7)')))"
        )
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("UserError programs cannot be isolated on this machine (namespaces+landlock+seccomp: ")
    assert all(f"{level}: " in lines[0] for level in LEVELS if level != UNSAFE)
    assert "sandbox level unsafe" in lines[0]
    assert "status='ok', stdout=b'7\\n'" in lines[1]


# A filter that the zygotes inherit: no unshare, no mount, no Landlock, as in a strict container.
REFUSING = """
import platform, struct
from branchmerge.evaluation.sandbox import kernel
op = lambda code, value, then=0, otherwise=0: struct.pack('HBBI', code, then, otherwise, value)
numbers = {'x86_64': (272, 165, 444), 'aarch64': (97, 40, 444)}[platform.machine()]
program = [op(0x20, 0)]
for number in numbers:
    program += [op(0x15, number, 0, 1), op(0x06, 0x00050000 | 1)]
kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
kernel.seccomp(b''.join([*program, op(0x06, 0x7FFF0000)]))
"""

FORKING = """
import os
from branchmerge.evaluation.sandbox import Job, shared
job = Job('print(1)', seconds=60)
mine = shared()
assert mine is shared()
assert mine.run(job).stdout == b'1\\n'
if os.fork() == 0:
    try:
        mine.run(job)
    except RuntimeError as error:
        print(error, flush=True)
    assert shared() is not mine
    print(shared().run(job).stdout, flush=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
print(mine.run(job).stdout)
"""


def test_fork_of_the_process_makes_its_own() -> None:
    ran = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=300)
    lines = ran.stdout.splitlines()
    assert lines == ["this sandbox belongs to another process; make one after the fork", "b'1\\n'", "b'1\\n'"], (
        ran.stderr
    )


def test_shared_sandbox_is_one() -> None:
    assert shared() is shared()


def test_time_in_which_others_had_the_processor_does_not_count() -> None:
    """A job shares a processor with three others that are busy, and has had 0.5 s of it after 2."""
    allowed = os.sched_getaffinity(0)
    others = []
    try:
        os.sched_setaffinity(0, {min(allowed)})  # for all that is started now
        shell = ["sh", "-c", "while :; do :; done"]
        others += [subprocess.Popen(shell, start_new_session=True) for _ in range(3)]
        with Sandbox(workers=1) as sandbox:
            if sandbox.level == BUBBLEWRAP:
                pytest.skip("the clock is bwrap's, not the program's")
            works = sandbox.run(Job("import time\nwhile time.process_time() < 0.5: pass\nprint('done')", seconds=1.0))
            sleeps = sandbox.run(Job("import time\ntime.sleep(50)", seconds=1.0))
            never_ends = sandbox.run(Job("while True: pass", seconds=0.3))
    finally:
        os.sched_setaffinity(0, allowed)
        for other in others:
            other.kill()
            other.wait()
    assert (works.status, works.stdout) == ("ok", b"done\n"), works
    assert works.seconds > 1.0
    assert sleeps.status == never_ends.status == "timeout"
    assert max(sleeps.seconds, never_ends.seconds) < zygote.PATIENCE
