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
COMPARED = ("loss", "grad_norm", "lr", "tokens", "supervised_tokens")
FSDP = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.progress=false")


def alone(student: Path, outputs: Path, *overrides: str) -> Path:
    """Train a branch in this process."""
    train(branch(student, outputs, *overrides))
    return outputs


def torchrun(processes: int, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
            *map(str, arguments)]  # fmt: skip


def wish(student: Path, wanted: dict[Path, tuple[str, ...]]) -> list[str | Path]:
    """What train_branches.py is told: the branches by their outputs."""
    text = json.dumps({str(outputs): [*FSDP, *overrides] for outputs, overrides in wanted.items()})
    return [WORKER, student, text]


def run_together(processes: int, student: Path, wanted: dict[Path, tuple[str, ...]]) -> str:
    """Train branches one after the other in so many processes; returns what was printed."""
    done = subprocess.run(
        torchrun(processes, *wish(student, wanted)), cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
