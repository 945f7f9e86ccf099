"""The callbacks that show how a branch trains: validation, samples and progress."""

import math
from pathlib import Path

from lightning import Callback

from branchmerge.config import TrainConfig
from branchmerge.data.datamodule import Corpus
from branchmerge.data.template import Document
from branchmerge.student.backbone import context_length, load_tokenizer
from branchmerge.student.ending import Ending
from branchmerge.student.progress import StepProgress
from branchmerge.student.samples import Samples
from branchmerge.student.validation import Validation


def watchers(config: TrainConfig, corpus: Corpus, start: Path, logs: Path, ending: Ending) -> list[Callback]:
    """The callbacks that `config` asks for.

    Args:
        start: the checkpoint that the branch starts from, for its tokenizer.
        ending: interrupts work between steps when a signal to end comes.
    """
    trainer = config.trainer
    found: list[Callback] = []
    if corpus.held_out:
        found.append(Validation(corpus.held_out, config.data.seq_len, trainer.validate_every_n_steps, ending))
    if trainer.sample_every_n_steps is not None:
        tokenizer, document = load_tokenizer(start), _sampled(corpus)
        longest = min(trainer.sample_tokens, (context_length(start) or math.inf) - document.prompt_len)
        found.append(Samples(tokenizer, document, trainer.sample_every_n_steps, int(longest), logs, ending))
    if trainer.progress:
        found.append(StepProgress(config.domain.name))
    return found


def _sampled(corpus: Corpus) -> Document:
    """The first held-out document of the branch's own data, else the first document that it trains on."""
    own = [document for part in corpus.account["sources"] for document in corpus.held_out.get(part, [])]
    return (own or corpus.documents)[0]
