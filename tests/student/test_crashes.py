"""A training that fails names in one line the rank, the step and, where they are known, the rows."""

import errno
import os
import re
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from branches import branch
from lightning import Callback
from test_progress import corpus, fitted
from test_resume import started, steps_saved, wait_for
from torch.distributed.checkpoint.api import CheckpointException

from branchmerge.data.batch import Batch
from branchmerge.data.datamodule import Corpus
from branchmerge.data.packing import Plan
from branchmerge.data.template import Document
from branchmerge.errors import UserError
from branchmerge.student import checkpoints
from branchmerge.student.backbone import load_tokenizer
from branchmerge.student.ending import Ending
from branchmerge.student.module import Student
from branchmerge.student.samples import Samples
from branchmerge.student.step_rows import StepRows
from branchmerge.student.training import train
from branchmerge.student.validation import Validation

__all__ = ["corpus"]

UNMAKEABLE = np.full(200, "?")
"""Tokens that no row can be made of"""
UNKNOWN = np.full(200, 99_999)
"""Tokens that the model does not have"""


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "failed" in line]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("step", "when"), [(0, "before the first step"), (1, "after step 1")])
def test_a_row_that_cannot_be_made(
    workers: int,
    step: int,
    when: str,
    tiny_student: Path,
    corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second row of a step; a worker makes rows of later steps before, and of its error only the text comes."""
    documents = [*corpus.documents, Document("broken-1", UNMAKEABLE, 1), Document("broken-2", UNMAKEABLE, 1)]
    number = len(corpus.documents)
    first, second, *_ = corpus.plan.steps
    steps = [(first[0], (number, number + 1)), second]
    plan = Plan(tuple(reversed(steps) if step else steps))
    with pytest.raises(TypeError, match="Cannot cast"):
        fitted(tiny_student, Corpus(documents, plan, {}), tmp_path, StepRows(256), workers=workers)
    assert told(capsys) == [f"rank 0 failed {when} on the rows broken-1, broken-2 (TypeError)"]


def test_a_worker_that_dies_ends_the_branch(tiny_student: Path, tmp_path: Path) -> None:
    """As for its memory. The other one heeds no SIGTERM, which is how Python ends it before it waits for it."""
    process = started(tiny_student, tmp_path, "data.workers=2", "optim.epochs=9999", "optim.max_steps=9999")
    wait_for(lambda: steps_saved(tmp_path), process)
    workers = [child for child in psutil.Process(process.pid).children() if child.name() == "pt_data_worker"]
    assert len(workers) == 2
    workers[0].kill()
    try:
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 1 and re.search(r"^rank 0 failed a(fter|t) step \d+ ", said, re.M), said
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize(("tokens", "error"), [(UNMAKEABLE, TypeError), (UNKNOWN, IndexError)], ids=["made", "seen"])
def test_a_held_out_row(
    tokens: np.ndarray,
    error: type[Exception],
    tiny_student: Path,
    corpus: Corpus,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After others, which were all right."""
    held_out = {"math": [*corpus.documents[:2], Document("broken-1", tokens, 1)]}
    validation = Validation(held_out, 200, 1, Ending())
    assert validation.rows["math"][0][0].id != "broken-1"
    with pytest.raises(error):
        fitted(tiny_student, corpus, tmp_path, validation, StepRows(256))
    assert told(capsys) == [f"rank 0 failed before the first step on the rows broken-1 ({error.__name__})"]


def test_a_sample(tiny_student: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = Samples(load_tokenizer(tiny_student), Document("broken-1", UNKNOWN, 3), 1, 4, tmp_path, Ending())
    with pytest.raises(IndexError):
        fitted(tiny_student, corpus, tmp_path, samples, StepRows(256))
    assert told(capsys) == ["rank 0 failed before the first step on the rows broken-1 (IndexError)"]


def test_what_is_done_after_the_last_step(
    tiny_student: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class AtEnd(Callback):
        def on_train_end(self, *_: object) -> None:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fitted(tiny_student, corpus, tmp_path, AtEnd(), StepRows(256))
    assert told(capsys) == ["rank 0 failed after step 3 (ArithmeticError)"]


@pytest.mark.parametrize("error", [OSError, CheckpointException])
@pytest.mark.parametrize("when", ["every second step", "told to end"])
def test_saving(
    error: type[BaseException],
    when: str,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By a broken disk, which torch tells in an error that is no Exception; whatever rows are about to come."""
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    usual = Student.training_step

    def save_shards(*_: object, **__: object) -> None:
        raise broken if error is OSError else CheckpointException("write", {0: (broken, None)})  # type: ignore[dict-item]

    def told_to_end(self: Student, batch: Batch, index: int) -> torch.Tensor:
        if self.trainer.global_step == 1 and when == "told to end":
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self, batch, index)

    monkeypatch.setattr(checkpoints, "save_shards", save_shards)
    monkeypatch.setattr(Student, "training_step", told_to_end)
    every = 2 if when == "every second step" else 1000
    with pytest.raises(error):
        train(branch(tiny_student, tmp_path, "domain=math", f"trainer.checkpoint.every_n_steps={every}"))
    step = 2 if when == "every second step" else 1
    assert told(capsys) == [f"rank 0 failed after step {step} ({error.__name__})"]


def test_a_users_mistake_has_its_own_line_only(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps without a finite gradient, which are told while their rows are in work."""
    usual = Student.training_step
    monkeypatch.setattr(Student, "training_step", lambda *given: usual(*given) * float("inf"))
    with pytest.raises(UserError, match=r"on the rows .*; lower optim\.lr"):
        train(branch(tiny_student, tmp_path, "domain=math", "trainer.max_skipped_steps=0"))
    assert told(capsys) == []
