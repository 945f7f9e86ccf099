"""Start the processes of branches: by torchrun for a branch on several devices of this machine, and a separate process
for each member of a multirun, so that what ends one (out of memory, a lost CUDA context) does not end the others.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from branchmerge import machine
from branchmerge.cli import SHOW, is_member
from branchmerge.config import TrainConfig
from branchmerge.config_checks import check_groups
from branchmerge.errors import UserError
from branchmerge.student import ranks

SECONDS_TO_END = 600
"""Time for processes to save a checkpoint after SIGTERM, before they are killed"""


@dataclass(frozen=True)
class Branch:
    """A training to be started."""

    config: TrainConfig
    program: str
    """The path of train.py"""
    arguments: list[str]
    """Arguments of train.py for this member of a multirun"""


def is_needed(config: TrainConfig) -> bool:
    """Whether this process should start the training's processes, rather than be one of them."""
    return (config.trainer.sharded or is_member()) and not ranks.is_one_of_several()


def this_branch(config: TrainConfig, program: str) -> Branch:
    """The branch that Hydra runs now, in `program` or in a process that a launcher of Hydra's started for it.

    It is started again as a single run, even if `hydra.mode` or flags asked for a multirun, with the job number and
    folder of this member, which its settings may refer to.
    """
    said = HydraConfig.get().overrides
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for short, long in (("-cd", "--config-dir"), ("-cp", "--config-path"), ("-cn", "--config-name")):
        options.add_argument(short, long)
    given = vars(options.parse_known_args(sys.argv[1:])[0])
    flags = [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]
    hydra = [*said.hydra, "hydra.mode=RUN"]  # the last one counts
    if is_member():
        running = HydraConfig.get()
        folder = running.runtime.output_dir.replace("\\", "\\\\").replace("'", "\\'")
        hydra = [override for override in hydra if not override.lstrip("+").startswith("hydra.run.dir=")]
        hydra += [f"hydra.job.num={running.job.num}", f"hydra.run.dir='{folder}'"]
    return Branch(config, program, [*flags, *hydra, *said.task])


def launch(branches: Sequence[Branch]) -> None:
    """Train the branches, in parallel as far as `trainer.gpus_per_job` allows; returns when all have ended.

    Raises:
        UserError: more than one node is requested, this machine has fewer devices than a branch takes, or its devices
            cannot be divided into the groups that the trainer asks for
        SystemExit: a branch failed, after the others have run; or this process got a signal to end
    """
    trainers = [branch.config.trainer for branch in branches]
    if (nodes := max(trainer.num_nodes for trainer in trainers)) > 1:
        raise UserError(
            f"trainer.num_nodes={nodes}: start train.py on every node by torchrun or Slurm, see docs/training.md"
        )
    if len(sizes := {str(trainer.gpus_per_job) for trainer in trainers}) > 1:
        raise UserError(
            f"trainer.gpus_per_job={','.join(sorted(sizes))}: members of a multirun share the GPUs of this machine in"
            " equal parts; give all the same, or start them by calls of their own"
        )
    places = _places(branches[0].config)
    side_by_side = min(len(places), len(branches))
    processes = [_processes(branch.config) for branch in branches]
    for branch, count in zip(branches, processes, strict=True):
        check_groups(branch.config.trainer, count)
    free: SimpleQueue[Sequence[int] | None] = SimpleQueue()
    for place in places:
        free.put(place)
    with _running() as running, ThreadPoolExecutor(len(places)) as pool:

        def run(branch: Branch, count: int) -> int:
            place = free.get()
            try:
                return running.run(branch, count, place, side_by_side)
            finally:
                free.put(place)

        statuses = list(pool.map(run, branches, processes))
    if running.told_to_end:
        raise SystemExit(128 + running.told_to_end)
    failed = [(b.config.domain.name, status) for b, status in zip(branches, statuses, strict=True) if status]
    for name, status in failed:
        if status < 0:
            ranks.say(f"domain={name}: was ended by {machine.signal_name(-status)}")
    if failed:
        names = ",".join(name for name, _ in failed)
        sys.exit(f"error: domain={names}: a process of it ended with an error; it is told above")


def _processes(config: TrainConfig) -> int:
    """Number of processes that a branch takes on this machine."""
    trainer = config.trainer
    if not trainer.sharded:
        return 1
    if machine.device_of(trainer.accelerator).type == "cpu":
        return trainer.gpus_per_job or trainer.devices or 1
    here = torch.cuda.device_count()
    wanted = trainer.gpus_per_job or trainer.devices or here
    if wanted > here:
        raise UserError(f"trainer.devices={wanted}: torch finds {here} CUDA devices here; use fewer")
    return wanted


def _places(config: TrainConfig) -> list[Sequence[int] | None]:
    """Sets of GPUs on which branches may train in parallel; None for a set: whatever GPUs there are."""
    size = config.trainer.gpus_per_job
    if size is None:
        return [None]
    if machine.device_of(config.trainer.accelerator).type == "cpu":
        return [None] * max(1, machine.cores() // size)
    here = torch.cuda.device_count()
    if size > here:
        raise UserError(f"trainer.gpus_per_job={size}: torch finds {here} CUDA devices here; use fewer")
    return [range(start, start + size) for start in range(0, here - size + 1, size)]


class _Running:
    """The processes that this one has started."""

    def __init__(self) -> None:
        self.told_to_end = 0
        """Number of the signal to end that this process got; 0 for none"""
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, branch: Branch, processes: int, place: Sequence[int] | None, side_by_side: int) -> int:
        """Start a branch and wait for its end; returns its exit status.

        Args:
            side_by_side: number of branches that share this machine's cores
        """
        command = [sys.executable, branch.program, *branch.arguments]
        environment = dict(os.environ)
        if branch.config.trainer.sharded:
            torchrun = ("-m", "branchmerge.student.local_processes", "--standalone", f"--nproc-per-node={processes}")
            command[1:1] = torchrun
            threads = max(1, machine.cores() // (processes * side_by_side))
            environment.setdefault("OMP_NUM_THREADS", str(threads))
            environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_END))
        environment["HYDRA_FULL_ERROR"] = os.environ.get(SHOW, os.environ.get("HYDRA_FULL_ERROR", "0"))
        if place is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                visible[number] if len(visible) > number and visible[number] else str(number) for number in place
            )
        with self._lock:
            if self.told_to_end:
                return ranks.PREEMPTED
            # In its own process group: Ctrl-C in a terminal goes to all of a group, and would not let the child save.
            child = subprocess.Popen(command, env=environment, preexec_fn=machine.end_with_parent, process_group=0)
            self._children.add(child)
        if self.told_to_end:  # a signal came while the child was being started
            child.send_signal(signal.SIGTERM)
        status = child.wait()
        with self._lock:
            self._children.discard(child)
        return status

    def end(self, number: int, _: Any) -> None:
        """Signal the children to save and end; a second Ctrl-C kills them at once."""
        at_once = number == self.told_to_end == signal.SIGINT
        if number == signal.SIGINT and not at_once:
            ranks.say("\ninterrupted: waiting until the processes have saved; once more to end them at once")
        self.told_to_end = number
        for child in tuple(self._children):
            child.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)


@contextmanager
def _running() -> Iterator[_Running]:
    """Inside, SIGTERM and Ctrl-C are passed on to the children."""
    running = _Running()
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as in processes that a script starts in background
    numbers = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    former = {number: signal.signal(number, running.end) for number in numbers}
    try:
        yield running
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
