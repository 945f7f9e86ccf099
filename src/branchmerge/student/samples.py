"""Samples of the student during training: its greedy answers to one prompt, at regular steps, in samples.jsonl."""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from branchmerge.data.batch import make_batch
from branchmerge.data.row_names import naming
from branchmerge.data.template import Document
from branchmerge.files import UNWRITABLE, write_text
from branchmerge.student import ranks
from branchmerge.student.between_steps import BetweenSteps, is_due, untouched
from branchmerge.student.ending import Ending
from branchmerge.student.loss import packed_logits
from branchmerge.student.module import Student

SAMPLES = "samples.jsonl"


class Samples(BetweenSteps):
    """Writes {"step", "id", "text"} lines: before the first step, every `every` steps, and after the last one.

    A run that resumes from a checkpoint keeps the lines of earlier steps.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        document: Document,
        every: int,
        tokens: int,
        folder: Path,
        ending: Ending,
    ) -> None:
        """
        Args:
            document: its prompt is answered.
            tokens: length limit of an answer.
        """
        self.tokenizer = tokenizer
        self.document = document
        self.every = every
        self.tokens = tokens
        self.path = folder / SAMPLES
        self.ending = ending

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if ranks.is_first():
            write_text(self.path, "".join(self._lines_before(trainer.global_step)))

    def between_steps(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, Student)
        if not is_due(step, self.every, module.total_steps):
            return
        check = partial(self.ending.check, module.total_steps - step)
        with naming([self.document.id]), untouched(trainer, module):
            answer = greedy(module, self.document, self.tokens, self.tokenizer.eos_token_id, check)
        if not ranks.is_first():
            return
        self._add({"step": step, "id": self.document.id, "text": self.tokenizer.decode(answer)})

    def _add(self, row: dict[str, Any]) -> None:
        """Append a line completely or not at all: the next one would be appended to a partial one, and lost with it."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            with suppress(OSError):  # the disk may be read-only by now
                os.truncate(self.path, size)
            ranks.say(f"warning: {self.path}: cannot be written ({error.strerror}); training goes on")

    def _lines_before(self, step: int) -> list[str]:
        """Lines of an earlier run before a step, without truncated or damaged ones."""
        if not step or not self.path.is_file():
            return []
        # Not splitlines(), which also splits at characters that may occur within a line of JSON.
        *lines, _ = self.path.read_bytes().split(b"\n")
        return [line.decode() + "\n" for line in lines if _step_of(line) < step]


def _step_of(line: bytes) -> float:
    """The step of a line; infinite if it is not a sample."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def greedy(student: Student, document: Document, longest: int, end: int, check: Callable[[], None]) -> list[int]:
    """Greedy decoding after a document's prompt, with the forward pass of training, without a cache.

    `check` is called before each token. All processes of a sharded student call this together, and use the first one's
    tokens.
    """
    prompt = document.tokens[: document.prompt_len].tolist()
    answer: list[int] = []
    while len(answer) < longest:
        check()
        tokens = np.array(prompt + answer)
        batch = make_batch([Document(document.id, tokens, len(tokens))], 1).to(student.device)
        last = torch.tensor([len(tokens) - 1], device=student.device)
        logits = student.packed.compute(partial(packed_logits, positions=last), batch)
        token = ranks.by_first(partial(int, logits[0].argmax()))
        if token == end:
            break
        answer.append(token)
    return answer
