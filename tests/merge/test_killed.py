"""Killed at any moment, a merge leaves nothing that looks finished, and the same command then succeeds."""

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from branchmerge.merge import Recipe, merge
from branchmerge.merge.operators.linear import Linear
from branchmerge.merge.tree import parse
from branchmerge.study import read_manifest, weights_sha256

SERVER = textwrap.dedent(
    """
    # For each line read, fork children that merge: imports take seconds, and are paid once.
    import os, signal, sys, tempfile, threading, time
    from dataclasses import dataclass
    from pathlib import Path
    import torch
    from branchmerge.merge import Recipe, merge
    from branchmerge.merge.operators.linear import Linear
    from branchmerge.merge.threads import workers
    from branchmerge.merge.tree import parse
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # forked processes share its usual one, also when one that holds it is killed

    STEPS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.copyfile", "shutil.rmtree")
    folders = {Path(folder).name: Path(folder) for folder in sys.argv[1:]}

    @dataclass(frozen=True)
    class Slow(Linear):
        def apply(self, measured, models, base=None):
            if models[0].numel() > 1:
                time.sleep(pause)
            return super().apply(measured, models, base)

    def die_at(out, step):
        # Every look at or change of the file system around the result is a step.
        seen = 0

        def watch(event, arguments):
            nonlocal seen
            if event in STEPS and str(out.parent) in str(arguments[0]):
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(watch)

    def child(out, shard, overwrite, step):
        if step >= 0:
            die_at(out, step)
        recipe = Recipe("linear", Slow(), parse(["a", "b"]), folders, out, None, shard, overwrite, False)
        merge(recipe)

    # Once here, so that no child compiles anything; with one thread, so that none is missing after a fork.
    pause = 0.0
    workers.use(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        child(Path(folder, "out"), 1 << 30, False, -1)
    workers.use(2)  # ends the pool of that one thread
    print("ready", flush=True)
    for line in sys.stdin:
        out, shard, overwrite, step, pause, seconds, count = line.split("\\t")
        pause = float(pause)
        children = []
        for _ in range(int(count)):
            pid = os.fork()
            if pid == 0:
                child(Path(out), int(shard), overwrite == "True", int(step))
                sys.stdout.flush()
                os._exit(0)
            children.append(pid)
        if float(seconds) >= 0:
            time.sleep(float(seconds))
            os.kill(children[0], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print("end", *codes, flush=True)
    """
)


QUICK = {**os.environ, "PATH": ""}
"""Where there is no git, a manifest names no commit; asking takes longer than all else here."""


class Server:
    """The process above, and what it is asked to do."""

    def __init__(self, folders: dict[str, Path]) -> None:
        command = [sys.executable, "-c", SERVER, *map(str, folders.values())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUICK)
        self.read("ready")

    def read(self, until: str) -> list[str]:
        assert self.process.stdout is not None
        lines: list[str] = []
        while not lines or not lines[-1].startswith(until):
            line = self.process.stdout.readline()
            assert line, "the server died"
            lines.append(line.strip())
        return lines

    def merge(
        self, out: Path, shard: int, overwrite: bool = False, step: int = -1, pause: float = 0, seconds: float = -1,
        count: int = 1,
    ) -> list[str]:  # fmt: skip
        """Returns what was printed, and the exit codes in the last line."""
        assert self.process.stdin is not None
        print(out, shard, overwrite, step, pause, seconds, count, sep="\t", file=self.process.stdin, flush=True)
        return self.read("end")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parents")
    found = {}
    for seed, leaf in enumerate(("a", "b")):
        found[leaf] = root / leaf
        found[leaf].mkdir()
        generator = torch.Generator().manual_seed(seed)
        weights = {f"layer.{i}": torch.randn(64, 64, generator=generator) for i in range(4)}
        save_file(weights, found[leaf] / "model.safetensors")
        (found[leaf] / "config.json").write_text('{"model_type": "llama"}')
        (found[leaf] / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return found


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Server]:
    started = Server(folders)
    yield started
    assert started.process.stdin is not None
    started.process.stdin.close()
    assert started.process.wait(timeout=30) == 0
    assert started.process.stdout is not None
    started.process.stdout.close()


SHARD = 40_000  # two tensors of 16 KiB


def recipe(folders: dict[str, Path], out: Path, shard: int = SHARD, overwrite: bool = False) -> Recipe:
    return Recipe("linear", Linear(), parse(["a", "b"]), folders, out, None, shard, overwrite, progress=False)


def assert_whole_or_absent(out: Path) -> bool:
    """Whether there is a result; one that is there is complete."""
    if not out.exists():
        return False
    manifest = read_manifest(out)
    assert manifest is not None and manifest.weights_sha256 == weights_sha256(out)
    assert {"config.json", "tokenizer.json", "tensors.json", "README.md"} <= {path.name for path in out.iterdir()}
    return True


def assert_alone(out: Path) -> None:
    """Nothing of killed runs lies beside a result."""
    assert sorted(path.name for path in out.parent.iterdir()) in ([f".{out.name}.lock", out.name], [out.name])


def test_killed_at_every_step_on_the_disk(server: Server, folders: dict[str, Path], tmp_path: Path) -> None:
    expected = weights_sha256(merge(recipe(folders, tmp_path / "expected")))
    killed = 0
    for step in range(200):
        out = tmp_path / str(step) / "out"
        code = server.merge(out, SHARD, step=step)[-1]
        found = assert_whole_or_absent(out)
        assert server.merge(out, SHARD)[-1] == "end 0"
        assert weights_sha256(out) == expected
        assert_alone(out)
        if code == "end 0":
            assert found
            break
        assert code == "end -9"
        killed += 1
    assert killed > 15


def test_killed_at_every_step_of_replacing_a_result(server: Server, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "results" / "out"
    new = weights_sha256(merge(recipe(folders, tmp_path / "new")))
    there = []
    for step in range(200):
        assert server.merge(out, 1 << 30, overwrite=True)[-1] == "end 0"
        old = weights_sha256(out)
        code = server.merge(out, SHARD, overwrite=True, step=step)[-1]
        there.append(assert_whole_or_absent(out))
        assert not out.exists() or weights_sha256(out) in (old, new)
        assert server.merge(out, SHARD, overwrite=True)[-1] == "end 0"
        assert weights_sha256(out) == new
        assert_alone(out)
        if code == "end 0":
            break
        assert code == "end -9"
    assert step > 15
    assert there.count(False) <= 2  # between the two renames only


def test_killed_after_any_time(server: Server, folders: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(1)
    expected = weights_sha256(merge(recipe(folders, tmp_path / "expected")))
    for number in range(12):
        out = tmp_path / str(number) / "out"
        server.merge(out, SHARD, pause=0.02, seconds=draw.uniform(0, 0.25))
        assert_whole_or_absent(out)
        assert server.merge(out, SHARD)[-1] == "end 0"
        assert weights_sha256(out) == expected
        assert_alone(out)


def test_of_two_processes_one_waits_and_both_succeed(server: Server, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = server.merge(out, SHARD, pause=0.1, count=2)
    assert said[-1] == "end 0 0"
    assert f"waiting for another process that is making {out}" in said
    assert f"{out}: done already" in said
    assert sum("merged" in line for line in said) == 1
    assert assert_whole_or_absent(out)
    assert_alone(out)


def test_a_waiting_process_takes_over_from_one_that_is_killed(
    server: Server, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = server.merge(out, SHARD, pause=0.1, seconds=0.2, count=2)
    assert said[-1].startswith("end -9 0")
    assert assert_whole_or_absent(out)
    assert_alone(out)
