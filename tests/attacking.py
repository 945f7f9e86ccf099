"""To attack the sandbox and look for survivors; shared by the tests that do."""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from branchmerge.errors import UserError
from branchmerge.evaluation.sandbox import Job, Outcome, Sandbox
from branchmerge.evaluation.sandbox.isolation import LEVELS, UNSAFE

PATIENCE = 30.0
"""Seconds that a loaded machine may take for what should be immediate."""
ISOLATING = [level for level in LEVELS if level != UNSAFE]


def sandbox_or_skip(level: str) -> Sandbox:
    try:
        return Sandbox(level, workers=2)
    except UserError as error:
        pytest.skip(str(error))


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def named(name: str) -> list[psutil.Process]:
    """Living processes of that name, anybody's and in any namespace below."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError, psutil.NoSuchProcess):
            if comm.read_text().strip() == name:
                process = psutil.Process(int(comm.parent.name))
                found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
    return found


def naming(name: str) -> str:
    """Code that gives the process, and so its children, a name by which to find them."""
    return f"import ctypes\nctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


def attack(sandbox: Sandbox, code: str, **limits: float) -> Outcome:
    """Run a program; fail if anything of it is left afterwards."""
    name = f"bm-{secrets.token_hex(5)}"
    before = zygotes()
    outcome = sandbox.run(Job(naming(name) + code, **({"seconds": PATIENCE} | limits)))  # type: ignore[arg-type]
    assert eventually(lambda: not named(name)), f"survivors: {named(name)}"
    assert zygotes() == before, "the zygote died"
    return outcome


def zygotes() -> set[int]:
    return {child.pid for child in psutil.Process().children()}
