"""Several processes stay in step where one of them has a difficulty, and know that they are several."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from branches import PROJECT, metrics
from conftest import make_student
from spreading import FSDP, TORCHRUN, started
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, Std, start_processes

from branchmerge.student import local_processes, ranks
from branchmerge.study import weights_sha256


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes tell."""
    folder = tmp_path_factory.mktemp("both")
    student = make_student(tmp_path_factory.mktemp("student") / "dropout", attention_dropout=0.2)
    command = [
        *TORCHRUN,
        f"--log-dir={folder / 'logs'}",
        "--redirects=1",
        "tests/distributed/in_each_process.py",
        folder,
        student,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{PROJECT / 'tests'}:{PROJECT / 'src'}"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = sorted((folder / "logs").rglob("stdout.log"))
    assert len(logs) == 2
    return [json.loads(log.read_text().splitlines()[-1]) for log in logs]


def test_all_get_the_first_ones_error(both: list[dict[str, Any]]) -> None:
    assert [each["user error"] for each in both] == ["UserError: a mistake"] * 2
    assert [each["other error"] for each in both] == [
        "UnsendableError: it broke", "RuntimeError: UnsendableError: it broke",
    ]  # fmt: skip


def test_a_disk_that_fails_for_one_of_them_is_told_to_all(both: list[dict[str, Any]]) -> None:
    first, second = (each["no room for the expert"] for each in both)
    assert first == second and "cannot write expert there (No space left on device); make room" in first
    assert [each["full disk"] for each in both] == ["False"] * 2
    assert [each["room for two"] for each in both] == [str(["step-00000002", "step-00000003"])] * 2
    assert ["Input/output error" in each["broken disk"] for each in both] == [True] * 2


FAILING = """
import os, runpy, sys
from branchmerge.student.module import Student

usual = Student.training_step

def failing(self, batch, index):
    if os.environ["RANK"] == "1" and self.trainer.global_step == 1:
        raise ValueError("a broken row")
    return usual(self, batch, index)

Student.training_step = failing
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_step_that_fails_in_one_of_them_names_it_and_its_rows(tiny_student: Path, tmp_path: Path) -> None:
    """And the other says that it lost one, not that its own rows are to blame."""
    program = tmp_path / "failing.py"
    program.write_text(FAILING)
    settings = (*FSDP, "domain=math", f"backbone.path={tiny_student}", f"outputs={tmp_path}")
    command = [*TORCHRUN, program, "--config-dir", "tests/conf", "study=tiny", *settings]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert re.search(r"^rank 1 failed at step 1 on the rows math-\d+(, math-\d+)* \(ValueError\)$", done.stderr, re.M)
    assert re.search(r"^rank 0 failed at step 1 as it could not reach another rank: ", done.stderr, re.M), done.stderr


@pytest.mark.parametrize("victim", ["train.py", "torchrun"])
def test_none_outlives_what_started_it(victim: str, tiny_student: Path, tmp_path: Path) -> None:
    """In the middle of a training, however that dies."""
    with started(tiny_student, tmp_path, "domain=math", "optim.epochs=9999", "trainer.devices=2") as launcher:
        curve = tmp_path / "tiny" / "logs" / "train" / "math" / "metrics.csv"
        end = time.monotonic() + 200
        while not curve.is_file():
            assert time.monotonic() < end and launcher.poll() is None
            time.sleep(0.05)
        started_by_it = psutil.Process(launcher.pid).children(recursive=True)
        (torchrun,) = psutil.Process(launcher.pid).children()
        assert len(started_by_it) >= 3
        (psutil.Process(launcher.pid) if victim == "train.py" else torchrun).kill()
        assert not psutil.wait_procs(started_by_it, timeout=60)[1]


def test_none_outlives_its_torchrun_also_while_it_imports(tiny_student: Path, tmp_path: Path) -> None:
    """It would wait half an hour for a store that has gone."""
    command = [
        sys.executable, "-m", "branchmerge.student.local_processes", "--standalone", "--nproc-per-node=2", "train.py",
        "--config-dir", "tests/conf", "study=tiny", *FSDP, f"backbone.path={tiny_student}", f"outputs={tmp_path}",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as torchrun:
        end = time.monotonic() + 120
        workers: list[psutil.Process] = []
        while len(workers) < 2 or not all(_has_loaded(worker, "libtorch") for worker in workers):
            workers = psutil.Process(torchrun.pid).children()
            assert time.monotonic() < end and torchrun.poll() is None
            time.sleep(0.01)
        torchrun.kill()
    assert not psutil.wait_procs(workers, timeout=30)[1]


def _has_loaded(process: psutil.Process, library: str) -> bool:
    return library in Path(f"/proc/{process.pid}/maps").read_text()


def test_nodes_with_other_weights_are_refused(both: list[dict[str, Any]], tmp_path: Path) -> None:
    """And the files of one node are read by its processes together: two of three, and one."""
    for name in "abc":
        (tmp_path / f"{name}.safetensors").write_text(f"{name}False")
    assert [each["weights"] for each in both] == [weights_sha256(tmp_path)] * 2
    assert [each["weights on one host"] for each in both] == [weights_sha256(tmp_path)] * 2
    for each in both:
        assert each["other weights"].startswith("UserError")
        assert "on two b.safetensors differs from the first node's" in each["other weights"]


def test_one_of_them_may_be_told_to_end_or_find_it_time_to_save(both: list[dict[str, Any]]) -> None:
    """All save at the same steps then and end together, and go on with the random numbers that each had."""
    for name, saved in (("by the clock", ["step-00000001", "step-00000002"]), ("told", ["step-00000002"])):
        assert [each[name] for each in both] == [["SystemExit: 143", saved, True, True]] * 2


def test_weights_that_are_no_numbers_in_one_of_them_are_told_by_all(both: list[dict[str, Any]]) -> None:
    assert [each["whole weights"] for each in both] == ["None"] * 2
    assert all("here 1 weights such as weight hold values that are no numbers" in b["broken weights"] for b in both)


def test_processes_that_would_compute_in_other_precisions_are_refused(both: list[dict[str, Any]]) -> None:
    """Of two hosts, as one device may be fast at bfloat16 and another not."""
    assert all("trainer.precision differs from the first node's" in each["other precision"] for each in both)


def test_processes_may_have_different_attention(both: list[dict[str, Any]]) -> None:
    """FlashAttention 4 on some of the devices only, which is then tried there."""
    assert [each["attention"] for each in both] == [["packed_sdpa", 1], ["packed_sdpa", 0]]  # and one warning


@pytest.mark.slow
def test_torchrun_trains_the_members_of_a_multirun_one_after_the_other(tiny_student: Path, tmp_path: Path) -> None:
    here = ("--config-dir", "tests/conf", "study=tiny", f"backbone.path={tiny_student}", f"outputs={tmp_path}")
    more = ("optim.max_steps=2", "optim.global_batch=2", "domain=math,code")
    command = [*TORCHRUN, "train.py", "-m", *here, *FSDP, *more]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(metrics(tmp_path, domain)) for domain in ("math", "code")] == [2, 2]


STEP = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_NAME": "branch"}


@pytest.mark.parametrize(
    ("changed", "several"),
    [
        ({}, True),
        ({"SLURM_STEP_NUM_TASKS": None}, True),
        ({"SLURM_STEP_ID": None}, False),  # what sbatch runs
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),  # a step of one task in a job of eight
        ({"SLURM_STEP_ID": "4294967290"}, False),  # typed into the shell that salloc gives
        ({"SLURM_JOB_NAME": "interactive"}, False),
    ],
    ids=str,
)
def test_only_several_tasks_of_srun_are_several_processes(
    changed: dict[str, str | None], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in {**STEP, **changed}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert ranks.is_one_of_several() == several


@pytest.mark.parametrize(("told", "said", "after_death"), [(signal.SIGTERM, "2", 60), (None, "60", 2)])
def test_processes_have_the_time_to_end_that_is_said(
    told: signal.Signals | None, said: str, after_death: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that ignore SIGTERM; also by a torchrun that does not know the variable. After a death it is short."""
    monkeypatch.setattr(PContext, "close", PContext.close)
    monkeypatch.setattr(local_processes, "SECONDS_AFTER_DEATH", after_death)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", said)
    local_processes.give_time()
    deaf = tmp_path / "deaf.py"
    deaf.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(flush=True)\ntime.sleep(60)\n"
    )
    logs = DefaultLogsSpecs(log_dir=str(tmp_path / "logs"), redirects=Std.ALL)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    processes = start_processes("deaf", sys.executable, {0: (str(deaf),)}, {0: {}}, logs)
    heard = Path(processes.stdouts[0])
    while not heard.stat().st_size:
        time.sleep(0.05)
    began = time.monotonic()
    processes.close(told)
    for number, handler in handlers.items():  # it set some for good
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    assert 2 <= time.monotonic() - began < 20
