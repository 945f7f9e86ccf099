"""A branch on two hosts: network namespaces with a cable between them, torchrun on each."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from branches import PROJECT
from spreading import alone, assert_equal_to, wish
from test_fsdp import LONG, is_alive, saved, wait_for

SETTINGS = ("domain=math", "data.seq_len=256", "optim.epochs=2", "optim.warmup_ratio=0.0", "optim.global_batch=4")


def has_namespaces() -> str:
    """Why there can be no second host here; empty where there can."""
    if os.geteuid() or shutil.which("ip") is None:
        return "needs root and ip"
    name = f"branchmerge-probe{os.getpid()}"  # the tests' processes ask at the same time
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made.stderr.strip()


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two network namespaces with a cable between them."""
    name = f"bm{os.getpid()}"
    hosts = [f"{name}a", f"{name}b"]
    commands = [f"netns add {hosts[0]}", f"netns add {hosts[1]}", f"link add {name}0 type veth peer name {name}1"]
    for i, host in enumerate(hosts):
        commands += [f"link set {name}{i} netns {host}", f"-n {host} link set {name}{i} name cable",
                     f"-n {host} addr add 10.231.7.{i + 1}/24 dev cable", f"-n {host} link set cable up",
                     f"-n {host} link set lo up"]  # fmt: skip
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True)
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def started_on_both(hosts: list[str], before: str, arguments: list[str | Path]) -> list["subprocess.Popen[str]"]:
    """`before` in a shell of each host, then torchrun in its place, of one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--rdzv-backend=c10d", "--rdzv-endpoint=10.231.7.1:29511"]  # fmt: skip
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, "sh", "-c", f'{before} exec "$@"', "sh", *torchrun,
             f"--rdzv-conf=is_host={1 - i}", f"--local-addr=10.231.7.{i + 1}", *arguments],
            cwd=PROJECT, env={**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i, host in enumerate(hosts)
    ]  # fmt: skip


def on_both(hosts: list[str], before: str, arguments: list[str | Path]) -> list[tuple[int, str]]:
    """How they ended and what they said."""
    running = started_on_both(hosts, before, arguments)
    said = [process.communicate(timeout=300)[0] for process in running]
    return [(process.returncode, told) for process, told in zip(running, said, strict=True)]


@pytest.mark.skipif(bool(has_namespaces()), reason=f"no second host: {has_namespaces()}")
def test_two_hosts_train_one_branch_and_refuse_outputs_on_disks_of_their_own(
    tiny_student: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    settings = (*SETTINGS, "trainer.num_nodes=2")
    with two_hosts() as hosts:
        # What `ip netns exec` runs has its own view of what is mounted where.
        ended = on_both(
            hosts,
            f"mount -t tmpfs none {own} &&",
            wish(tiny_student, {tmp_path / "shared": settings, own: settings}),
        )
    assert all(status for status, _ in ended), ended
    assert "give an outputs= (or out=) on a disk that all nodes share" in ended[0][1], ended
    assert_equal_to(alone(tiny_student, tmp_path / "alone", *SETTINGS), tmp_path / "shared")


@pytest.mark.slow
@pytest.mark.skipif(bool(has_namespaces()), reason=f"no second host: {has_namespaces()}")
def test_a_backbone_that_one_host_alone_sees_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "models" / "student"))
    hide = f"ip addr show cable | grep -q 10.231.7.1 || mount -t tmpfs none {folder.parent};"
    with two_hosts() as hosts:
        ended = on_both(hosts, hide, wish(folder, {tmp_path / "outputs": (*SETTINGS, "trainer.num_nodes=2")}))
    assert all(status for status, _ in ended), ended
    assert f"{folder}: is there for the first process, but not on" in ended[0][1], ended


@pytest.mark.slow
@pytest.mark.skipif(bool(has_namespaces()), reason=f"no second host: {has_namespaces()}")
def test_a_host_that_dies_ends_the_other_within_a_minute_and_the_next_run_goes_on(
    tiny_student: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    command = wish(tiny_student, {outputs: (*LONG, "trainer.num_nodes=2")})
    with two_hosts() as hosts:
        first, second = started_on_both(hosts, "", command)
        wait_for(lambda: saved(outputs), second)
        for each in [*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)]:
            each.kill()
        workers = psutil.Process(first.pid).children(recursive=True)
        said = first.communicate(timeout=60)[0]
        second.communicate()
        assert first.returncode not in (0, None), said
        assert workers and not [worker for worker in workers if is_alive(worker)]
        assert not (outputs / "tiny" / "experts" / "math").exists()
        ended = on_both(hosts, "", command)
    assert [status for status, _ in ended] == [0, 0], ended
    assert "going on after step" in ended[0][1]
    assert_equal_to(alone(tiny_student, tmp_path / "alone", *LONG), outputs)
