"""A branch that is told to end does so soon, loses nothing by it, and is whole where it had ended already."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from branches import branch, metrics
from lightning import Callback
from test_resume import expert, steps_saved
from torch.distributed.checkpoint import FileSystemWriter

from branchmerge.student import fit, samples, training, validation
from branchmerge.student.export import export
from branchmerge.student.module import Student
from branchmerge.student.resume import Resume
from branchmerge.student.samples import SAMPLES
from branchmerge.student.training import train
from branchmerge.study import read_manifest, weights_sha256

SETTINGS = (
    "domain=math", "optim.epochs=20", "optim.max_steps=6", "optim.global_batch=3", "data.validation_rows=4",
    "trainer.validate_every_n_steps=2", "trainer.sample_every_n_steps=2", "trainer.sample_tokens=4",
    "trainer.checkpoint.every_n_steps=1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def student(student_factory: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with dropout, whose random numbers must go on as if nothing had been."""
    return student_factory(tmp_path_factory.mktemp("student") / "tiny", attention_dropout=0.2)


@pytest.fixture(scope="module")
def uninterrupted(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("uninterrupted")
    train(branch(student, outputs, *SETTINGS))
    return outputs


def seen(outputs: Path) -> tuple[Any, ...]:
    """Curve, samples and weights of a branch."""
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics(outputs, "math")]
    return rows, (outputs / "tiny" / "logs" / "train" / "math" / SAMPLES).read_text(), weights_sha256(expert(outputs))


def telling(usual: Callable[..., Any], number: int) -> Callable[..., Any]:
    """A function in whose call of that number (from 0) this process is told to end."""
    calls = itertools.count()

    def calling(*given: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*given)

    return calling


PLACES: dict[str, tuple[object, str, int]] = {
    "the second row of the third step": (Student, "training_step", 2 * 3 + 1),
    "the second of three domains after two steps": (validation, "share", 3 + 1),
    "the second token after two steps": (samples, "make_batch", 4 + 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_under_way_is_left_off_and_done_by_the_next_run(
    place: str,
    student: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name, number = PLACES[place]
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(owner, name, telling(getattr(owner, name), number))
        train(branch(student, tmp_path, *SETTINGS))
    assert ended.value.code == 128 + signal.SIGTERM
    assert "told to end after step 2 of" in capsys.readouterr().out
    assert steps_saved(tmp_path) == [2]
    train(branch(student, tmp_path, *SETTINGS))
    assert seen(tmp_path) == seen(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_a_checkpoint_is_loaded_ends_the_run_as_any_other(
    number: signal.Signals,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The Trainer's own handlers are there then, which end with 0 (1), as if all were done."""

    def told(*_: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Resume, "on_train_start", told)
    with pytest.raises(SystemExit) as ended:
        train(branch(tiny_student, tmp_path, "domain=math"))
    assert ended.value.code == 128 + number
    assert "told to end after step 0 of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "name", "times"),
    [(Student, "on_fit_start", 1), (Student, "training_step", 2), (FileSystemWriter, "finish", 2)],
)
def test_ctrl_c_that_ends_at_once_is_told_as_such(
    owner: type, name: str, times: int, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is to be saved, or the second one; the Trainer makes a status of 1 of it, without a word."""

    def pressed(*_: Any, **__: Any) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(owner, name, pressed)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(branch(tiny_student, tmp_path, "domain=math", "trainer.checkpoint.every_n_steps=1"))
    assert signal.getsignal(signal.SIGINT) == before


def export_told(number: signal.Signals) -> Callable[..., str]:
    """`export`, in a process that gets a signal as it begins."""

    def told(*args: Any) -> str:
        os.kill(os.getpid(), number)
        return export(*args)

    return told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_after_the_last_step_waits_until_all_is_published(
    number: signal.Signals, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "export", export_told(number))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train(branch(tiny_student, tmp_path, "domain=math", "optim.max_steps=1"))
    assert ended.value.code == 128 + number
    assert read_manifest(tmp_path / "tiny" / "experts" / "math") is not None
    assert not list((tmp_path / "tiny").rglob("*.partial"))
    assert signal.getsignal(number) == before


def test_ctrl_c_twice_after_the_last_step_ends_at_once(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InLastStep(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training, "export", export_told(signal.SIGINT))
    monkeypatch.setattr(fit, "watchers", lambda *_: [InLastStep()])
    with pytest.raises(KeyboardInterrupt):
        train(branch(tiny_student, tmp_path, "domain=math", "optim.max_steps=1", "optim.global_batch=1"))
    assert not (tmp_path / "tiny" / "experts" / "math").exists()


def test_ctrl_c_that_is_ignored_stays_ignored(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "export", export_told(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(branch(tiny_student, tmp_path, "domain=math", "optim.max_steps=1"))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
