"""What test_ranks.py has two processes do; each prints a line of JSON: what became of it, by name.

torchrun ... tests/distributed/in_each_process.py FOLDER
"""

import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from branchmerge.errors import UserError
from branchmerge.student import agreement, checkpoints, ranks
from branchmerge.student.attention import PACKED_FLASH4, PACKED_SDPA
from branchmerge.student.checkpoints import CheckpointFolder, Position
from branchmerge.student.trials import choose_attention
from branchmerge.study import Manifest


class UnsendableError(Exception):
    """That cannot be sent to another."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.lock = threading.Lock()


def told(work: Callable[[], object]) -> str:
    """What it returned or raised."""
    try:
        return str(work())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refuse(error: Exception) -> Callable[[], str]:
    def work() -> str:
        raise error

    return lambda: ranks.by_first(work)


def written(folder: Path, number: int) -> bool:
    """A checkpoint of which the second process's part is not on the disk in the end; `number` says why."""
    usual = checkpoints._sync

    def sync(paths: list[Path]) -> None:
        if ranks.rank() == 1:
            raise OSError(number, os.strerror(number))
        usual(paths)

    def save(partial: Path) -> None:
        (partial / f"part-{ranks.rank()}").write_bytes(b"weights")

    checkpoints._sync = sync
    try:
        return CheckpointFolder(folder, Manifest("expert", "math", {}, {}), 1).write(
            Position(step=1, seconds=1.0), save
        )
    finally:
        checkpoints._sync = usual


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


def main(folder: Path) -> None:
    ranks.join(torch.device("cpu"))
    attn = (PACKED_FLASH4, PACKED_SDPA)[ranks.rank()]
    apart = ["one", "two"]
    done = {
        "weights": told(lambda: backbone_on(apart, folder, other=False)),
        "weights on one host": told(lambda: backbone_on(["one"] * 2, folder, other=False)),
        "other weights": told(lambda: backbone_on(apart, folder, other=True)),
        "user error": told(refuse(UserError("a mistake"))),
        "other error": told(refuse(UnsendableError("it broke"))),
        "full disk": told(lambda: written(folder, errno.EDQUOT)),
        "broken disk": told(lambda: written(folder, errno.EIO)),
        "attention": told(lambda: choose_attention(attn, None, torch.device("cpu"), torch.bfloat16)),
    }
    print(json.dumps(done), flush=True)
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
