"""What test_ranks.py has two processes do; each prints a line of JSON: what became of it, by name.

torchrun ... tests/distributed/in_each_process.py FOLDER STUDENT
"""

import errno
import json
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from branches import branch, metrics
from spreading import FSDP

from branchmerge.data.batch import Batch
from branchmerge.errors import UserError
from branchmerge.student import agreement, checkpoints, ranks, resume
from branchmerge.student.attention import PACKED_FLASH, PACKED_SDPA
from branchmerge.student.checkpoints import CheckpointFolder, Position
from branchmerge.student.export import check_finite
from branchmerge.student.module import Student
from branchmerge.student.training import _helping, train
from branchmerge.student.trials import choose_attention
from branchmerge.study import Manifest, publish, weights_sha256

PLANNED = Manifest("expert", "math", {}, {})


class UnsendableError(Exception):
    """That cannot be sent to another."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.lock = threading.Lock()


def told(work: Callable[[], object]) -> str:
    """What it returned or raised."""
    try:
        return str(work())
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def refuse(error: Exception) -> Callable[[], str]:
    def work() -> str:
        raise error

    return lambda: ranks.by_first(work)


def published(folder: Path) -> None:
    """Where the disk is full for the first one, which alone writes."""
    with publish(folder / "expert", PLANNED) if ranks.is_first() else _helping(folder / "expert"):
        refuse(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))()


def written(folder: Path, number: int) -> bool:
    """A checkpoint of which the second process's part is not on the disk in the end; `number` says why."""
    usual = checkpoints.sync

    def sync(path: Path) -> None:
        if ranks.rank() == 1:
            raise OSError(number, os.strerror(number))
        usual(path)

    def save(partial: Path) -> None:
        (partial / f"part-{ranks.rank()}").write_bytes(b"weights")

    checkpoints.sync = sync
    try:
        return CheckpointFolder(folder, PLANNED, 1).write(Position(step=1, seconds=1.0), save)
    finally:
        checkpoints.sync = usual


def made_room(folder: Path) -> list[str]:
    """What is left of three checkpoints where the disk has room for two, which only the second process finds out."""
    saved = CheckpointFolder(folder, PLANNED, 2)

    def save(partial: Path) -> None:
        if ranks.rank() == 1 and (saved.folder / "step-00000001").exists() and step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        (partial / f"part-{ranks.rank()}").write_bytes(b"weights")

    for step in (1, 2, 3):
        assert saved.write(Position(step=step, seconds=1.0), save)
        ranks.wait()  # until the first process has removed the oldest
    return sorted(path.name for path in saved.folder.iterdir())


def backbone_on(hosts: list[str], folder: Path, other: bool) -> str:
    """Fingerprint of three files, as processes on such hosts find it; the second one may have another file."""
    usual = socket.gethostname
    mine = folder / f"backbone-{ranks.rank()}"
    mine.mkdir(exist_ok=True)
    for name in "abc":
        changed = other and name == "b" and ranks.rank() == 1
        (mine / f"{name}.safetensors").write_text(f"{name}{changed}")
    socket.gethostname = lambda: hosts[ranks.rank()]
    try:
        return agreement.weights_sha256(mine)
    finally:
        socket.gethostname = usual


def interrupted(folder: Path, student: Path, *when: str) -> list[object]:
    """A branch of two rows a process and step, of which only the second is told to end, between those of the third.

    And where it is saved by the clock, only the first one's says that it is time.

    Args:
        when: it is saved besides

    Returns:
        how it ended, the steps that were saved, and whether the next run made of it what it would have been
    """
    settings = (*FSDP, "domain=math", "optim.epochs=4", "optim.max_steps=4", "optim.global_batch=4", *when)
    usual_step, usual_time = Student.training_step, resume.time

    def step(self: Student, batch: Batch, index: int) -> torch.Tensor:
        if ranks.rank() == 1 and index == 2 * 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual_step(self, batch, index)

    if ranks.rank() == 1:
        resume.time = SimpleNamespace(monotonic=lambda: 0.0)
    Student.training_step = step
    ended = told(lambda: train(branch(student, folder / "cut", *settings)))
    Student.training_step, resume.time = usual_step, usual_time
    saved = sorted(path.name for path in (folder / "cut").glob("tiny/checkpoints/*/step-*"))
    made = [train(branch(student, folder / name, *settings)) for name in ("cut", "whole")]
    ranks.wait()
    curves = [[row["loss"] for row in metrics(folder / name, "math")] for name in ("cut", "whole")]
    return [ended, saved, curves[0] == curves[1], weights_sha256(made[0]) == weights_sha256(made[1])]


def broken(places: list[int]) -> torch.nn.Linear:
    """A layer that is broken in some of the processes."""
    layer = torch.nn.Linear(2, 2)
    if ranks.rank() in places:
        torch.nn.init.constant_(layer.weight, torch.nan)
    return layer


def attention_and_warnings(attn: str) -> tuple[str, int]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return choose_attention(attn, {}, torch.device("cpu"), torch.bfloat16), len(told)


def main(folder: Path, student: Path) -> None:
    ranks.join(torch.device("cpu"))
    attn = (PACKED_FLASH[4], PACKED_SDPA)[ranks.rank()]
    apart = ["one", "two"]
    precision = ("trainer.precision=32-true", "trainer.precision=bf16-mixed")[ranks.rank()]
    done: dict[str, object] = {
        "weights": told(lambda: backbone_on(apart, folder, other=False)),
        "weights on one host": told(lambda: backbone_on(["one"] * 2, folder, other=False)),
        "other weights": told(lambda: backbone_on(apart, folder, other=True)),
        "user error": told(refuse(UserError("a mistake"))),
        "other error": told(refuse(UnsendableError("it broke"))),
        "no room for the expert": told(lambda: published(folder)),
        "full disk": told(lambda: written(folder, errno.EDQUOT)),
        "room for two": told(lambda: made_room(folder / "small")),
        "broken disk": told(lambda: written(folder, errno.EIO)),
        "by the clock": interrupted(
            folder / "clock",
            student,
            "trainer.checkpoint.every_n_steps=null",
            "trainer.checkpoint.every_n_minutes=1e-9",
        ),
        "told": interrupted(folder / "told", student, "trainer.checkpoint.every_n_steps=1000"),
        "broken weights": told(lambda: check_finite(broken([1]), "here")),
        "whole weights": told(lambda: check_finite(broken([]), "here")),
        "other precision": told(lambda: train(branch(student, folder, *FSDP, "domain=math", precision))),
        "attention": attention_and_warnings(attn),
    }
    print(json.dumps(done), flush=True)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
