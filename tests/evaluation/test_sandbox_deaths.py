"""Deaths of the sandbox itself: its client, and the zygotes that fork the jobs."""

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from attacking import ISOLATING, PATIENCE, eventually, named, naming, sandbox_or_skip, zygotes

from branchmerge.evaluation.sandbox import Job, Outcome, Sandbox
from branchmerge.evaluation.sandbox.isolation import BUBBLEWRAP, has_namespaces


@pytest.fixture(scope="module", params=ISOLATING)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with sandbox_or_skip(request.param) as made:
        yield made


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
