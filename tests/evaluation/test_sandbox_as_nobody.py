"""The sandbox's other tests as an ordinary user, where they run as root."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from branchmerge.evaluation.sandbox.isolation import NOBODY

ROOT = Path(__file__).resolve().parents[2]
ATTACKS = ("sandbox_attacks", "sandbox_files", "sandbox_reuse", "sandbox_deaths")
ALL = ("sandbox", "sandbox_limits", *ATTACKS)

AS_NOBODY = """
import os, sys
from pathlib import Path
from branchmerge.evaluation.sandbox import kernel
needed, command = eval(sys.argv[1]), sys.argv[2:]
hidden = {str(parent) for path in needed for parent in Path(path).parents if not parent.stat().st_mode & 1}
if hidden:  # as a home of root's: in a mount namespace of our own, put others in their place that let everybody pass
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount('', '/', flags=kernel.MS_REC | kernel.MS_PRIVATE)
    opened = {path: os.open(path, os.O_PATH) for path in needed if hidden & {str(p) for p in Path(path).parents}}
    for folder in sorted(hidden):
        if Path(folder).exists():
            kernel.mount('tmpfs', folder, 'tmpfs', 0, 'mode=755')
    for path, number in opened.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        kernel.mount(f'/proc/self/fd/{number}', path, flags=kernel.MS_BIND | kernel.MS_REC)
os.setgroups([])
os.setresgid(NOBODY, NOBODY, NOBODY)
os.setresuid(NOBODY, NOBODY, NOBODY)
os.execve(command[0], command, {'PATH': os.defpath, 'HOME': '/nonexistent', 'PYTHONDONTWRITEBYTECODE': '1'})
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tests", [ATTACKS, pytest.param(ALL, marks=pytest.mark.slow)], ids=["attacks", "all"])
def test_sandbox_as_an_ordinary_user(tests: tuple[str, ...]) -> None:
    if os.getuid() != 0:
        pytest.skip("the tests ran as an ordinary user; only root can become another")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in tests]
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-n", "3"]  # most of them wait for limits
    needed = [sys.base_prefix, sys.prefix, str(ROOT)]
    code = AS_NOBODY.replace("NOBODY", str(NOBODY))
    command = [sys.executable, "-c", code, repr(needed), sys.executable, "-m", "pytest", *options, *files]
    ran = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=1100)
    if "PermissionError" in ran.stderr and "unshare" in ran.stderr:
        pytest.skip("the interpreter is in a home of root's, and this root may not mount it elsewhere")
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
