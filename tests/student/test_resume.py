"""A killed or stopped branch goes on from its last checkpoint, to the same curve and the same weights."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from branches import PROJECT, branch, metrics

from branchmerge.errors import UserError
from branchmerge.student import checkpoints
from branchmerge.student.checkpoints import CheckpointFolder, Position
from branchmerge.student.training import train
from branchmerge.study import Manifest, read_manifest, weights_sha256

SETTINGS = (
    "domain=math", "optim.epochs=20", "optim.max_steps=20", "optim.global_batch=3",
    "trainer.checkpoint.every_n_steps=2",
)  # fmt: skip
COMPARED = ("step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens")


@pytest.fixture(scope="module")
def uninterrupted(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("uninterrupted")
    train(branch(tiny_student, outputs, *SETTINGS))
    return outputs


def curve(outputs: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in COMPARED) for row in metrics(outputs, "math")]


def expert(outputs: Path) -> Path:
    return outputs / "tiny" / "experts" / "math"


def steps_saved(outputs: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in outputs.glob("tiny/checkpoints/*/step-*"))


def started(
    student: Path, outputs: Path, *more: str, program: tuple[str, ...] = ("train.py",)
) -> subprocess.Popen[str]:
    """`python train.py` of the same branch, as a process of its own."""
    command = [
        sys.executable, *program, "--config-dir", "tests/conf", "study=tiny", f"backbone.path={student}",
        "trainer=cpu", "trainer.precision=32-true", "trainer.progress=false", f"outputs={outputs}", *SETTINGS, *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    """Until a process has come so far."""
    assert callable(condition)
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def assert_same_branch(outputs: Path, uninterrupted: Path) -> None:
    assert curve(outputs) == curve(uninterrupted)
    assert weights_sha256(expert(outputs)) == weights_sha256(expert(uninterrupted))
    assert not list(outputs.glob("tiny/checkpoints/*"))


def test_killed_in_the_middle_of_a_step(
    tiny_student: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = started(tiny_student, tmp_path)
    wait_for(lambda: steps_saved(tmp_path), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not expert(tmp_path).exists()
    saved = max(steps_saved(tmp_path))
    train(branch(tiny_student, tmp_path, *SETTINGS))
    assert f"going on after step {saved} of 20" in capsys.readouterr().out
    assert_same_branch(tmp_path, uninterrupted)
    manifest = read_manifest(expert(tmp_path))
    assert manifest is not None and manifest.training["steps"] == len(curve(uninterrupted)) == 20


DYING = """
import os, runpy, signal, sys
from branchmerge.student.module import Student

usual = Student.training_step

def dying(self, batch, index):
    share = usual(self, batch, index)
    if self.trainer.global_step == 5 and index % self.trainer.accumulate_grad_batches == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return share

Student.training_step = dying
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_killed_between_the_rows_of_a_step_with_a_worker(
    tiny_student: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """The sixth step has the gradient of two of its three rows when the process goes."""
    killed = started(tiny_student, tmp_path, "data.workers=1", program=("-c", DYING))
    said = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL and steps_saved(tmp_path)[-1] == 4, said
    again = started(tiny_student, tmp_path, "data.workers=1")
    said = again.communicate()[0]
    assert again.returncode == 0 and "going on after step 4 of 20" in said, said
    assert_same_branch(tmp_path, uninterrupted)


WHILE_SAVING = """
import os, runpy, signal, sys
from branchmerge.student import checkpoints

usual = checkpoints.save_shards

def dying(*given, **named):
    usual(*given, **named)
    if "step-00000006" in str(named["checkpoint_id"]):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save_shards = dying
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_killed_while_it_writes_a_checkpoint(
    tiny_student: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = started(tiny_student, tmp_path, program=("-c", WHILE_SAVING))
    said = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL and steps_saved(tmp_path) == [2, 4], said
    (left,) = tmp_path.glob("tiny/checkpoints/*/.step-*")
    folder = folder_with(left.parent.parent)
    folder.folder = left.parent
    assert folder.write(Position(step=5, seconds=1.0), lambda partial: torch.save(1, partial / "state.pt"))
    assert not left.exists() and steps_saved(tmp_path) == [2, 4, 5]
    shutil.rmtree(left.parent / "step-00000005")
    train(branch(tiny_student, tmp_path, *SETTINGS))
    assert "going on after step 4 of 20" in capsys.readouterr().out
    assert_same_branch(tmp_path, uninterrupted)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_saves_and_goes_on_later(
    sent: signal.Signals,
    tiny_student: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A terminal and Slurm tell all processes of it, those too that make its rows."""
    never = "trainer.checkpoint.every_n_steps=1000"
    curve_file = tmp_path / "tiny" / "logs" / "train" / "math" / "metrics.csv"
    process = started(tiny_student, tmp_path, never, "data.workers=2")
    wait_for(lambda: curve_file.is_file() and len(curve_file.read_text().splitlines()) > 1, process)
    os.killpg(process.pid, sent)
    said = process.communicate()[0]
    assert process.returncode == 128 + sent, said
    assert "run the same command again to go on" in said and "Traceback" not in said
    (saved,) = steps_saved(tmp_path)
    assert saved < len(curve(uninterrupted))
    train(branch(tiny_student, tmp_path, *SETTINGS, never))
    assert f"going on after step {saved} of" in capsys.readouterr().out
    assert_same_branch(tmp_path, uninterrupted)


def manifest(**work: object) -> Manifest:
    return Manifest("expert", "math", {}, dict(work))


def folder_with(tmp_path: Path, *steps: int, keep_last: int = 3) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path, manifest(lr=1), keep_last)
    for step in steps:
        position = Position(step=step, seconds=float(step))
        assert folder.write(position, lambda partial, step=step: torch.save(step, partial / "state.pt"))  # type: ignore[misc]
    return folder


def test_the_last_ones_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 2, 4, 6, 100, keep_last=2)
    assert sorted(path.name for path in folder.folder.iterdir()) == ["step-00000006", "step-00000100"]
    newest = folder.newest()
    assert newest is not None and (newest.step, newest.seconds) == (100, 100.0)
    assert torch.load(newest.folder / "state.pt") == 100
    assert CheckpointFolder(tmp_path, manifest(lr=2), 2).newest() is None  # other work
    folder.remove()
    assert folder.newest() is None


@pytest.mark.parametrize("harm", ["flipped", "cut", "lost", "no record", "broken record", "other step"])
def test_one_that_is_not_whole_is_passed_over(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, 2, 4)
    last = folder.folder / "step-00000004"
    state, record = last / "state.pt", last / "checkpoint.json"
    if harm == "flipped":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif harm == "cut":
        state.write_bytes(state.read_bytes()[:-1])
    elif harm == "broken record":
        record.write_text(record.read_text()[:-10])
    elif harm == "other step":
        record.write_text(record.read_text().replace('"step": 4', '"step": 5'))
    else:
        (record if harm == "no record" else state).unlink()
    found = folder.newest()
    assert found is not None and found.step == 2
    assert f"warning: {last}: not whole" in capsys.readouterr().out
    assert folder.write(Position(step=4, seconds=4.0), lambda partial: torch.save(4, partial / "state.pt"))
    found = folder.newest()
    assert found is not None and found.step == 4


def test_a_checkpoint_of_other_rows_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, 2)
    folder.rows = "ab"
    assert folder.write(Position(step=4, seconds=4.0), lambda partial: torch.save(4, partial / "state.pt"))
    found = folder.newest()
    assert found is not None and found.step == 4
    folder.rows = "cd"
    found = folder.newest()
    assert found is not None and found.step == 2  # from before they were recorded
    assert "made of other rows than those that were prepared now" in capsys.readouterr().out


def test_later_ones_that_were_passed_over_do_not_outlive_new_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else they would count as the last ones, and what is written would go at once."""
    folder = folder_with(tmp_path, 400, 500, keep_last=2)
    for left in folder.folder.iterdir():
        (left / "state.pt").unlink()
    assert folder.newest() is None
    said = capsys.readouterr().out
    assert "step-00000500: not whole" in said and "going on from the one before\n" in said
    assert said.endswith("starting anew\n")
    for step in (10, 20, 30):
        assert folder.write(Position(step=step, seconds=1.0), lambda partial: torch.save(1, partial / "state.pt"))
    found = folder.newest()
    assert found is not None and found.step == 30
    assert sorted(path.name for path in folder.folder.iterdir()) == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("writer", ["torch.save", "shards"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(
    writer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a disk in memory: {mounted.stderr.strip()}")
    try:
        folder = folder_with(tmp_path, 2)
        model = torch.nn.Linear(1 << 10, 1 << 10)
        optimizer = torch.optim.AdamW(model.parameters())
        fill = {
            "torch.save": lambda partial: torch.save(model.weight, partial / "state.pt"),
            "shards": lambda partial: checkpoints.save_state(partial, model, optimizer, checkpoints.generators()),
        }[writer]
        assert not folder.write(Position(step=4, seconds=4.0), fill)
        assert "this checkpoint cannot be written" in capsys.readouterr().out
        assert [path.name for path in folder.folder.iterdir()] == ["step-00000002"]
        found = folder.newest()
        assert found is not None and found.step == 2
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)  # torch may still hold the file that it gave up


def test_checkpoints_of_other_settings_are_told_and_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with(tmp_path, 2)
    other = folder.root / f"{folder.name}-{'0' * 12}" / "step-00000007"
    other.mkdir(parents=True)
    (other / "state.pt").write_bytes(bytes(2_000_000))
    folder.tell_of_others()
    said = capsys.readouterr().out
    assert said.count("holds") == 1 and f"{other.parent}: holds 0.002 GB of checkpoints of" in said
    assert (other / "state.pt").exists()


def test_a_disk_without_room_for_checkpoints_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = shutil.disk_usage(tmp_path).free
    folder = folder_with(tmp_path)
    folder.tell_if_small(free // 10)
    assert "warning" not in capsys.readouterr().out
    folder.tell_if_small(free)
    said = capsys.readouterr().out
    assert "up to 4 checkpoints of" in said and "trainer.checkpoint.keep_last=1" in said
    folder_with(tmp_path, 2).tell_if_small(free)
    assert "warning" not in capsys.readouterr().out  # what is there already was written


def test_a_disk_without_room_for_the_expert_is_refused_first(tiny_student: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "small"
    outputs.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "none", outputs], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a disk in memory: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match=r"the expert will take .* GB, the disk has .* GB left; make room"):
            train(branch(tiny_student, outputs, "domain=math"))
    finally:
        subprocess.run(["umount", "--lazy", outputs], check=True)


def test_another_error_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "broken disk")

    with pytest.raises(OSError, match="broken disk"):
        folder_with(tmp_path).write(Position(step=2, seconds=2.0), fail)


@pytest.mark.parametrize("steps", [0, 1])
def test_weights_moments_and_generators_come_back(steps: int, tmp_path: Path) -> None:
    """Also where there are no moments yet, as all steps were left out; and to save them changes none."""

    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))  # as those of a vision tower
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    unsaved = made()
    expected = [step(*unsaved) for _ in range(steps + 3)][steps:]
    model, optimizer = made()
    for _ in range(steps):
        step(model, optimizer)
    checkpoints.save_state(tmp_path, model, optimizer, checkpoints.generators())
    assert [step(model, optimizer) for _ in range(3)] == expected
    other, its_optimizer = made()
    checkpoints.load_state(tmp_path, other, its_optimizer)
    assert [step(other, its_optimizer) for _ in range(3)] == expected
