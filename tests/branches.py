"""Branches of the tiny study, as the tests describe them."""

import csv
import socket
from pathlib import Path

from hydra import compose, initialize_config_dir

from branchmerge import config
from branchmerge.config_checks import typed

PROJECT = Path(__file__).resolve().parents[1]
config.register()


def branch(student: Path, outputs: Path, *overrides: str) -> config.TrainConfig:
    """Settings of a branch from a student, on the CPU in float32 where `overrides` say nothing else."""
    quiet = ["trainer=cpu", "trainer.precision=32-true", "trainer.progress=false", f"outputs={outputs}"]
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        search = f"hydra.searchpath=[file://{PROJECT}/tests/conf]"
        cfg = compose("train", [search, "study=tiny", f"backbone.path={student}", *quiet, *overrides])
        return typed(cfg, config.TrainConfig)


def metrics(outputs: Path, domain: str) -> list[dict[str, str]]:
    """The curve of a branch."""
    with (outputs / "tiny" / "logs" / "train" / domain / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def free_port() -> int:
    """One at which processes of a branch can meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
