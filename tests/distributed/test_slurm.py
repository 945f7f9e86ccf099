"""Branches that a real Slurm starts; skipped where none answers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from branches import PROJECT
from spreading import FSDP, alone, assert_equal_to

from branchmerge.study import read_manifest

SETTINGS = ("domain=math", "data.seq_len=256", "optim.max_steps=3", "optim.warmup_ratio=0.0", "optim.global_batch=2")


def has_slurm() -> bool:
    if shutil.which("sinfo") is None:
        return False
    try:
        found = subprocess.run(["sinfo", "--noheader"], capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return False
    return found.returncode == 0 and bool(found.stdout.strip())


pytestmark = pytest.mark.skipif(not has_slurm(), reason="no Slurm answers here")


def arguments(student: Path, outputs: Path, *overrides: str) -> list[str]:
    own = (f"hydra.searchpath=[file://{PROJECT}/tests/conf]", "study=tiny", f"backbone.path={student}")
    nodes = ("trainer=fsdp_multinode", *FSDP[1:], "trainer.num_nodes=1")
    return [sys.executable, "train.py", *own, *nodes, f"outputs={outputs}", *overrides]


def srun(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["srun", "--export=ALL", *words]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=500)


def test_tasks_that_are_not_counted_by_node_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    done = srun("--ntasks=2", *arguments(tiny_student, tmp_path, *SETTINGS))
    assert done.returncode == 1 and "--ntasks-per-node=2" in done.stderr and "Traceback" not in done.stderr


def test_srun_trains_what_one_process_does(tiny_student: Path, tmp_path: Path) -> None:
    done = srun("--nodes=1", "--ntasks-per-node=2", *arguments(tiny_student, tmp_path / "srun", *SETTINGS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equal_to(alone(tiny_student, tmp_path / "alone", *SETTINGS), tmp_path / "srun")


@pytest.mark.slow
def test_submitit_sends_each_domain_to_a_job(tiny_student: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("pip install hydra-submitit-launcher")
    launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.nodes=1", "hydra.launcher.tasks_per_node=2",
                "hydra.launcher.timeout_min=10")  # fmt: skip
    command = [*arguments(tiny_student, tmp_path, *SETTINGS[1:], "domain=math,code", *launcher), "--multirun"]
    done = subprocess.run(command, cwd=PROJECT, env=dict(os.environ), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for domain in ("math", "code"):
        manifest = read_manifest(tmp_path / "tiny" / "experts" / domain)
        assert manifest is not None and len(manifest.training["runs"][-1]["devices"]) == 2


def test_a_step_of_one_task_starts_its_processes_itself(tiny_student: Path, tmp_path: Path) -> None:
    here = ("--config-dir", "tests/conf", "study=tiny", f"backbone.path={tiny_student}", f"outputs={tmp_path}")
    done = srun(
        "--ntasks=1", "--cpus-per-task=2", sys.executable, "train.py", *here, *FSDP, "trainer.devices=2", *SETTINGS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = read_manifest(tmp_path / "tiny" / "experts" / "math")
    assert manifest is not None and len(manifest.training["runs"][-1]["devices"]) == 2
