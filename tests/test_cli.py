"""What the three entry points share."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from branchmerge.cli import importing

PROJECT = Path(__file__).resolve().parents[1]
SPINS = "from branchmerge import cli; import os; cli.run(lambda: print(os.environ.get('GOMP_SPINCOUNT')))"
INTERRUPTED = "from branchmerge import cli; import os, signal; cli.run(lambda: os.kill(os.getpid(), signal.SIGINT))"


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_openmps_threads_let_go_of_their_core_unless_told_otherwise(given: dict[str, str], found: str) -> None:
    bare = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", SPINS], env=bare | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


def test_what_the_output_cannot_show_ends_nothing() -> None:
    """As names of rows, in an environment of another encoding."""
    program = "from branchmerge import cli; cli.run(lambda: print('r\xf6ws-1'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "r\\xf6ws-1\n")


def test_ctrl_c_ends_with_the_status_that_shells_give_it() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stderr == "interrupted; run the same command again to go on\n"


def test_ctrl_c_while_python_ends_adds_no_traceback() -> None:
    again = f"import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT); {INTERRUPTED}"
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT  # a shell's 130
    assert done.stderr == "interrupted; run the same command again to go on\n"


def test_a_disk_too_full_for_hydras_files_is_told_without_a_name() -> None:
    """Which the error of a write does not have."""
    full = "from branchmerge import cli; cli.run(lambda: open('/dev/full', 'wb', buffering=0).write(b'x'))"
    done = subprocess.run([sys.executable, "-c", full], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    said = "error: the log of this call: cannot be made or read (No space left on device); give an outputs= of your own"
    assert done.stderr == f"{said}\n"


def test_a_folder_of_a_later_member_that_cannot_be_made_is_one_line(
    script: Callable[..., subprocess.CompletedProcess[str]], tiny_student: Path, tmp_path: Path
) -> None:
    """The first member's job has ended by then; the models come after the last."""
    copy = shutil.copytree(tiny_student, tmp_path / "copy")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "1").write_text("in the way")
    where = [f"outputs={tmp_path}/outputs", f"hydra.sweep.dir={tmp_path}/logs", f"out={tmp_path}/m${{hydra:job.num}}"]
    failed = script("merge", "-m", f"tree=[{tiny_student},{copy}]", "operator=linear,slerp", *where)
    assert failed.returncode == 1
    assert failed.stderr == (
        f"error: {tmp_path}/logs/1: cannot be made or read (File exists); give an outputs= of your own\n"
    )
    assert not list(tmp_path.glob("m*"))


ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
"""In front of a command: root without its right to read everything"""


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root reads everything")
def test_a_file_that_this_user_may_not_read_is_one_line(tiny_student: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_student, tmp_path / "other")
    (other / "tokenizer.json").chmod(0)
    merge = [sys.executable, "merge.py", f"tree=[{tiny_student},{other}]", f"out={tmp_path}/m", f"outputs={tmp_path}"]
    before = [] if os.geteuid() else ORDINARY
    done = subprocess.run([*before, *merge], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    said = f"error: {other}/tokenizer.json: Permission denied; change its permissions, or give another\n"
    assert (done.returncode, done.stderr) == (1, said)


TELLS = """
from branchmerge import cli

def main():
    for number in range(3000):
        print(number, flush=number % 2 == 0)
    open(OUT, "w").write("done")

cli.run(main)
"""


@pytest.mark.parametrize("kind", ["a reader that has gone", "a full disk"])
def test_output_that_gets_lost_ends_nothing(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TELLS.replace("OUT", repr(str(tmp_path / "out")))]
    if kind == "a full disk":
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == 0
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == ("", 0)
        process.stderr.close()
    assert (tmp_path / "out").read_text() == "done"


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_a_member_of_a_multirun_leaves_is_collected() -> None:
    """The next one imports nothing new; what it froze then would stay for ever."""
    with importing():
        pass
    left = weakref.ref(_Cycle())
    with importing():
        pass
    assert left() is not None
    gc.collect()
    assert left() is None
