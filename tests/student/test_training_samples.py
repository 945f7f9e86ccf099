"""Which prompt is answered while a branch trains, and where the answer ends."""

from pathlib import Path

import torch
from branches import branch
from test_progress import corpus

from branchmerge.config import OptimConfig
from branchmerge.data.datamodule import Corpus, prepare
from branchmerge.student import attention
from branchmerge.student.backbone import load_model, load_tokenizer
from branchmerge.student.loss import PackedLoss
from branchmerge.student.module import Student
from branchmerge.student.samples import greedy
from branchmerge.student.watch import _sampled
from branchmerge.trajectories.sources import read_branch

__all__ = ["corpus"]


def test_an_answer_ends_before_the_end_of_sequence(tiny_student: Path, corpus: Corpus) -> None:
    """Here a token that the student says after others."""
    student = Student(PackedLoss(load_model(tiny_student, torch.float32, attention.PACKED_SDPA)), OptimConfig(), 1)
    with torch.no_grad():
        for document in corpus.documents:
            answer = greedy(student, document, 12, -1, lambda: None)
            assert len(answer) == 12
            if (place := answer.index(answer[-1])) > 0:
                assert greedy(student, document, 12, answer[-1], lambda: None) == answer[:place]
                return
    raise AssertionError("all answers are one token over and over")


def test_a_held_out_prompt_of_the_branch_is_answered_where_there_is_one(
    tiny_student: Path, corpus: Corpus, tmp_path: Path
) -> None:
    assert _sampled(corpus) is corpus.documents[0]
    settings = branch(tiny_student, tmp_path, "domain=science", "data.validation_rows=2")
    watched = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    assert _sampled(watched) is watched.held_out["science"][0]
