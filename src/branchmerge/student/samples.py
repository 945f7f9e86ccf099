"""What the student answers while it trains: one prompt, greedily, every so many steps, into samples.jsonl."""

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

    A run that goes on from a checkpoint keeps the lines of the steps before.
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
            document: the one whose prompt is answered.
            tokens: of the longest answer.
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
        """A line, whole or not at all: the next one would be added to half of it, and lost with it."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            with suppress(OSError):  # as where nothing can be changed any more
                os.truncate(self.path, size)
            ranks.say(f"warning: {self.path}: cannot be written ({error.strerror}); training goes on")

    def _lines_before(self, step: int) -> list[str]:
        """Of an earlier run; a line that was cut off or damaged is left out."""
        if not step or not self.path.is_file():
            return []
        # Not by splitlines, which knows more ends of lines than JSON's.
        *lines, _ = self.path.read_bytes().split(b"\n")
        return [line.decode() + "\n" for line in lines if _step_of(line) < step]


def _step_of(line: bytes) -> float:
    """Infinite where it is no sample."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def greedy(student: Student, document: Document, longest: int, end: int, check: Callable[[], None]) -> list[int]:
    """The likeliest token after a document's prompt, and so on; computed as in training, without a cache.

    `check` is called before each token.

    All processes of a sharded student do this together, and take the first one's tokens.
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
