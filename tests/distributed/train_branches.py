"""Train branches, one after the other, in each of several processes: what the tests run.

    torchrun ... tests/distributed/train_branches.py STUDENT '{"OUTPUTS": ["override", ...], ...}'
    python tests/distributed/train_branches.py STUDENT '[{"processes": 2, "starter": "torchrun", "branches": {...}}]'

Without a starter it forks the processes of each group itself, with the variables that torchrun or srun would set: they
have imported everything then, which is most of what a process costs.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from branchmerge.cli import importing

with importing():
    from branches import branch, free_port

    from branchmerge.config import TrainConfig
    from branchmerge.student import ranks
    from branchmerge.student.training import train


def variables(starter: str, rank: int, world: int, port: int) -> dict[str, str]:
    """What a process is told by torchrun on one node, or by srun for as many tasks on one node."""
    if starter == "srun":
        told: dict[str, Any] = {
            "SLURM_JOB_ID": 1, "SLURM_JOB_NAME": "branch", "SLURM_NTASKS": world, "SLURM_NTASKS_PER_NODE": world,
            "SLURM_NNODES": 1, "SLURM_NODEID": 0, "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_ID": 0,
            "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port,
        }  # fmt: skip
    else:
        told = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests",
        }  # fmt: skip
    return {name: str(value) for name, value in told.items()}


def described(student: Path, branches: dict[str, list[str]]) -> list[TrainConfig]:
    return [branch(student, Path(outputs), *overrides) for outputs, overrides in branches.items()]


def train_all(branches: list[TrainConfig]) -> None:
    for each in branches:
        train(each)
    ranks.leave()


def forked(student: Path, group: dict[str, Any]) -> int:
    """Train a group's branches in processes of its own; how many of them failed."""
    port, world = free_port(), group["processes"]
    branches = described(student, group["branches"])
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            os.environ.update(variables(group["starter"], rank, world, port))
            try:
                train_all(branches)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    student, wanted = Path(sys.argv[1]), json.loads(sys.argv[2])
    if isinstance(wanted, dict):
        train_all(described(student, wanted))
    else:
        sys.exit(sum(forked(student, group) for group in wanted))
