"""The processes of one training: which one this is, and how they communicate.

A training on several devices is one process per device, started by torchrun or Slurm. In a single process, all
functions here are trivial.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

from branchmerge import machine
from branchmerge.errors import UserError
from branchmerge.files import writing

if TYPE_CHECKING:  # the import takes ten seconds, and a process that only starts others does not need it
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

T = TypeVar("T")

PREEMPTED = 128 + signal.SIGTERM
"""Exit status of a training that ended cleanly on a signal"""
INTERACTIVE = ("bash", "interactive")
"""Names of Slurm jobs that are an interactive shell, as in Lightning"""
SLURMS_OWN = 0xFFFFFFF0
"""First of the step numbers that Slurm reserves for itself: a job's script, its interactive shell"""
PATIENCE = timedelta(days=7)
"""How long processes wait for the first one, which may wait for another run, or grade and tokenise for hours"""
HANGING = timedelta(minutes=30)
"""How long processes wait for each other in training; a death is noticed at once, by what started them."""
_patient: dist.ProcessGroup | None = None
"""A gloo group of all processes with PATIENCE, for work that the first one does alone; None: the default group"""


def is_one_of_several() -> bool:
    """Whether torchrun or srun started this process.

    Under Slurm, only srun starts several: a script that sbatch runs is a single process, however many tasks the job has
    room for; so is a command in an interactive step, and the only task of a step.
    """
    step = int(os.environ.get("SLURM_STEP_ID", SLURMS_OWN))
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    by_srun = step < SLURMS_OWN and tasks > 1 and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE
    return dist.is_torchelastic_launched() or by_srun


def environment() -> "ClusterEnvironment | None":
    """Lightning's interface to what started this process as one of several; None for a single process."""
    if not is_one_of_several():
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if dist.is_torchelastic_launched():
        return TorchElasticEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False) if SLURMEnvironment.detect() else None
    except RuntimeError as error:  # variables that it does not support; it says what to set instead
        raise UserError(str(error)) from error


def join(device: torch.device) -> None:
    """Join the process group of this training; returns when all processes have joined."""
    found = environment()
    if found is None or dist.is_initialized():
        return
    machine.end_with_parent()
    os.environ.setdefault("MASTER_ADDR", found.main_address)
    os.environ.setdefault("MASTER_PORT", str(found.main_port))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(found.local_rank())
    dist.init_process_group(backend, rank=found.global_rank(), world_size=found.world_size(), timeout=HANGING)
    global _patient
    _patient = dist.new_group(timeout=PATIENCE, backend="gloo")


def leave(_: object = None) -> None:
    """Leave the process group; without this, a process may exit while another still waits for it."""
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that prints, logs and publishes."""
    return rank() == 0


def say(text: str) -> None:
    """Print in the first process only. A closed pipe or a full disk on the other end does not end a training."""
    if is_first():
        with suppress(OSError):
            print(text, flush=True)


def is_first_to_tell(mistake: str) -> bool:
    """Whether this is the first process of the same torchrun to report a mistake, which most processes make together.

    Uses torchrun's own store, as the processes may not have joined a group yet.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))  # type: ignore[attr-defined]
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        return store.add(f"branchmerge/{attempt}/{mistake}", 1) == 1
    except (KeyError, ValueError, RuntimeError):  # torchrun is ending, or its variables are another program's
        return True


def wait() -> None:
    """Wait until all processes have called this."""
    if world() > 1:
        dist.barrier(group=_patient)


def by_first(work: Callable[[], T]) -> T:
    """Call `work` in the first process; all processes return its result, or raise its error."""
    if world() == 1:
        return work()
    answer: list[Any] = [None, None]
    own: Exception | None = None
    if is_first():
        try:
            answer[0] = work()
        except Exception as error:
            own = error
            answer[1] = _sendable(error)
    dist.broadcast_object_list(answer, group=_patient)
    if own is not None:
        raise own
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def _sendable(error: Exception) -> Exception:
    """The error, or one like it that can be pickled; an OSError keeps its number, which `files.writing` reads."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror)
    return RuntimeError(f"{type(error).__name__}: {error}")


def check_shared(folder: Path) -> None:
    """Refuse a folder that is not the same one for all processes, as on a local disk of each node."""
    if world() == 1:
        return
    probe = folder / by_first(lambda: _new_file(folder))
    try:
        check_seen(probe, "give an outputs= (or out=) on a disk that all nodes share")
    finally:
        if is_first():
            probe.unlink(missing_ok=True)


def check_seen(path: Path, remedy: str) -> None:
    """Refuse a path that some of the processes do not see."""
    blind = sorted({host for host, sees in from_all((socket.gethostname(), _appears(path))) if not sees})
    if blind:
        raise UserError(f"{path}: is there for the first process, but not on {', '.join(blind)}; {remedy}")


def _new_file(folder: Path) -> str:
    """Create a file with a unique name in `folder`; returns the name."""
    file = folder / f".seen-by-all-{uuid4().hex}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    return file.name


def _appears(path: Path, seconds: float = 10) -> bool:
    """Whether the path exists, perhaps after some seconds: shared disks may show a new file late."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def from_all(value: T) -> list[T]:
    """The value of every process, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def summed(*values: float) -> list[float]:
    """Sums over all processes, in float64."""
    if world() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]
