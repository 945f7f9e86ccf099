"""From raw rows to packed batches of a training: select, tokenise, plan, load."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from branchmerge.config import TrainConfig
from branchmerge.data.batch import Batch, make_batch, make_idle_batch, supervised_tokens
from branchmerge.data.held_out import hold_out
from branchmerge.data.packing import Plan, Row, Step, first_documents, make_plan
from branchmerge.data.row_names import naming
from branchmerge.data.template import Document, check_prompts, tokenise
from branchmerge.errors import UserError
from branchmerge.trajectories import sources
from branchmerge.trajectories.schema import Trajectory
from branchmerge.trajectories.selection import Said, select


class PackedRows(Dataset[Batch]):
    """One process's rows of some of the plan's steps, in the order of training.

    The rows of a step are dealt to the processes in turn. If they do not divide evenly, the last processes get an idle
    row, since all must take part in every collective operation.
    """

    def __init__(self, documents: list[Document], steps: Sequence[Step], rank: int = 0, world: int = 1) -> None:
        self.documents = documents
        self.rows: list[Row] = []
        self.supervised_in_step: list[int] = []
        self.idle: list[bool] = []
        for step in steps:
            supervised = sum(supervised_tokens(documents[number]) for row in step for number in row)
            for place in range(rank, -(-len(step) // world) * world, world):
                self.idle.append(place >= len(step))
                self.rows.append(step[min(place, len(step) - 1)])
                self.supervised_in_step.append(supervised)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        make = make_idle_batch if self.idle[index] else make_batch
        row = [self.documents[number] for number in self.rows[index]]
        with naming([document.id for document in row]):
            return make(row, self.supervised_in_step[index])


@dataclass
class Corpus:
    """The data that a branch trains on, and the account of it for the manifest."""

    documents: list[Document]
    plan: Plan
    account: dict[str, Any]
    held_out: dict[str, list[Document]] = field(default_factory=dict)
    """Documents for validation, by part of the corpus; not trained on"""
    fingerprint: str = ""
    """SHA-256 of the tokens and the plan; empty unless they are kept on disk"""

    @property
    def tokens(self) -> int:
        """Tokens of the whole training, prompts included."""
        return sum(len(self.documents[number]) for row in self.plan.rows for number in row)

    @property
    def supervised(self) -> int:
        """Learned tokens of the whole training."""
        return sum(supervised_tokens(self.documents[number]) for row in self.plan.rows for number in row)


class TrajectoryData(LightningDataModule):
    """Loads the corpus for the Trainer, one packed row at a time, in the plan's order, from `first_step` on."""

    def __init__(
        self,
        corpus: Corpus,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pinned: bool = False,
    ) -> None:
        """`pinned`: in pinned memory, for asynchronous copies to a GPU."""
        super().__init__()
        self.corpus = corpus
        self.first_step = first_step
        self.rank, self.world = rank, world
        self.workers = workers
        self.pinned = pinned
        self.came_at = 0.0
        """time.perf_counter when the last row arrived"""

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.came_at = time.perf_counter()
        return batch

    def train_dataloader(self) -> DataLoader[Batch]:
        steps = self.corpus.plan.steps[self.first_step :]
        rows = PackedRows(self.corpus.documents, steps, self.rank, self.world)
        init, workers, pinned = _ignore_signals_but_parents, self.workers, self.pinned
        return DataLoader(rows, batch_size=None, num_workers=workers, worker_init_fn=init, pin_memory=pinned)


def _ignore_signals_but_parents(_: int) -> None:
    """Make a DataLoader worker ignore all signals to end but those of its parent process.

    A terminal and Slurm signal both, but the parent may need more rows before it saves. Its own SIGTERM must count:
    Python sends it at exit to workers that an error has left running, and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where nothing tells who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None
    Thread(target=_exit_on_sigterm_of, args=(parent.pid,), daemon=True).start()


def _exit_on_sigterm_of(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def data_account(config: TrainConfig) -> dict[str, Any]:
    """The sources of the branch and what identifies them, known before any row is read."""
    named = sources.of_branch(config)
    return {"sources": {name: sources.described(source) for name, source in named.items()}}


def prepare(
    config: TrainConfig,
    rows: dict[str, list[Trajectory]],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None = None,
) -> Corpus:
    """Select, tokenise and plan; dropped rows are counted by reason.

    Args:
        context: longest document that the model supports, in tokens; None for no limit but the length of a packed row.
    """
    longest = min(config.data.seq_len, context or config.data.seq_len)
    account = data_account(config)
    for part in rows.values():
        check_prompts(tokenizer, part)  # before grading, which may take hours
    held_out = hold_out(config, rows, tokenizer, longest)
    documents: list[Document] = []
    taken: set[Said] = set()
    for name, part in rows.items():
        trainable = held_out.removed_from(part)
        selection = select(trainable, config.data.verify, config.trainer.progress, taken)
        if len(trainable) < len(part):
            selection.dropped["held_out"] = len(part) - len(trainable)
        entry = account["sources"][name]
        hidden = None if config.trainer.progress else True  # None: as in `select`
        tokenised = tokenise(tokenizer, selection.rows)
        bar = tqdm(tokenised, total=len(selection.rows), desc="tokenise", disable=hidden)
        dropped, kept, cut, unverified = Counter(selection.dropped), len(documents), 0, 0
        for row, document in zip(selection.rows, bar, strict=True):
            reason = _why_not(document, longest, config.data.too_long)
            if reason:
                dropped[reason] += 1
                continue
            cut += len(document) > longest
            unverified += row.reference is None or not config.data.verify
            documents.append(Document(document.id, document.tokens[:longest], document.prompt_len))
        entry |= {
            "read": len(part), "kept": len(documents) - kept, "dropped": dict(dropped),
            "truncated": cut, "unverified": unverified,
        }  # fmt: skip
    if not documents:
        lost = {name: entry["dropped"] for name, entry in account["sources"].items()}
        raise UserError(
            f"domain={config.domain.name}: no trajectory is left to train on (dropped: {lost});"
            f" check the data, data.verify, and data.seq_len and the model's context ({longest} tokens at most)"
        )
    if config.data.packed_rows is not None:
        lengths = [len(document) for document in documents]
        few = first_documents(lengths, config.data.seq_len, config.data.packed_rows, config.seed)
        documents = [documents[number] for number in few]
    corpus = Corpus(documents, plan_of(config, documents), account, held_out.documents)
    account |= {"rows": len(documents), "tokens": corpus.tokens, "supervised_tokens": corpus.supervised}
    if held_out.documents:
        account["held_out"] = {part: len(chosen) for part, chosen in held_out.documents.items()}
    return corpus


def plan_of(config: TrainConfig, documents: Sequence[Document]) -> Plan:
    """The plan of rows and steps for these documents."""
    lengths, optim = [len(document) for document in documents], config.optim
    return make_plan(lengths, config.data.seq_len, optim.global_batch, optim.epochs, optim.max_steps, config.seed)


def _why_not(document: Document, longest: int, too_long: str) -> str:
    """Why a document is dropped (empty if it is not): a flaw, or more than `longest` tokens that must not be truncated.

    A document whose prompt alone is that long has nothing to learn, and is dropped even if truncation is allowed.
    """
    if document.flaw:
        return document.flaw
    cannot_be_cut = too_long == "drop" or document.prompt_len >= longest
    return "too_long" if len(document) > longest and cannot_be_cut else ""
