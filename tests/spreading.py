"""Branches in several processes over gloo, for the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from branches import PROJECT, branch, metrics
from safetensors.torch import load_file

from branchmerge.student.training import train

WORKER = PROJECT / "tests" / "distributed" / "train_branches.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
COMPARED = ("loss", "grad_norm", "lr", "tokens", "supervised_tokens", "rows", "padding_share")
FSDP = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.progress=false")


def alone(student: Path, outputs: Path, *overrides: str) -> Path:
    """Train a branch in this process."""
    train(branch(student, outputs, *overrides))
    return outputs


def wish(student: Path, wanted: dict[Path, tuple[str, ...]]) -> list[str | Path]:
    """What train_branches.py is told under torchrun: the branches by their outputs."""
    return [WORKER, student, json.dumps(_named(wanted))]


def run_groups(student: Path, groups: dict[tuple[str, int], dict[Path, tuple[str, ...]]]) -> str:
    """Train groups of branches, each in so many processes that were started so; returns what was printed."""
    wanted = [
        {"starter": starter, "processes": processes, "branches": _named(branches)}
        for (starter, processes), branches in groups.items()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(WORKER), str(student), json.dumps(wanted)]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _named(wanted: dict[Path, tuple[str, ...]]) -> dict[str, list[str]]:
    return {str(outputs): [*FSDP, *overrides] for outputs, overrides in wanted.items()}


def weights(outputs: Path) -> dict[str, torch.Tensor]:
    return load_file(outputs / "tiny" / "experts" / "math" / "model.safetensors")


def assert_equal_to(reference: Path, outputs: Path, tolerance: float = 1e-5) -> None:
    """Same curve, same weights."""
    ours, theirs = metrics(outputs, "math"), metrics(reference, "math")
    assert len(ours) == len(theirs) > 1
    for name in COMPARED:
        expected = [float(row[name]) for row in theirs]
        assert [float(row[name]) for row in ours] == pytest.approx(expected, rel=tolerance), name
    for name, tensor in weights(reference).items():
        torch.testing.assert_close(weights(outputs)[name], tensor, rtol=0, atol=tolerance, msg=name)


def started(student: Path, outputs: Path, *overrides: str, multirun: bool = False) -> subprocess.Popen[str]:
    """`python train.py trainer=fsdp`, which starts the processes itself."""
    here = ("--config-dir", "tests/conf", "study=tiny", f"backbone.path={student}", f"outputs={outputs}")
    command = [sys.executable, "train.py", *["-m"] * multirun, *here, *FSDP, *overrides]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
