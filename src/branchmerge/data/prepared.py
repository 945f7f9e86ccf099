"""A branch's documents on disk: prepared once by the first process, read by all processes and by resumed runs.

    checkpoints/<domain>-<fingerprint of the work>/corpus/
        tokens.int32  the concatenated documents: those to train on, then those held out
        corpus.json   id, length and prompt length of each, the account of the rows, versions; SHA-256 of tokens and of
                      documents

The tokens are memory-mapped, so that the processes of a node share one copy. Rows are graded only once: a program close
to its time limit may pass today and fail tomorrow, or on another core. With rows that vary so, each process would train
on different data, and a resumed run would follow another plan than its checkpoint was made under.
"""

import hashlib
import json
import os
import shutil
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from branchmerge import machine
from branchmerge.config import TrainConfig
from branchmerge.data.datamodule import Corpus, data_account, plan_of, prepare
from branchmerge.data.template import Document
from branchmerge.errors import UserError
from branchmerge.evaluation.graders import GRADING
from branchmerge.evaluation.math_worker import end_workers
from branchmerge.files import file_sha256, whole_or_gone, write_text
from branchmerge.student import backbone, ranks
from branchmerge.trajectories.sources import read_branch
from branchmerge.versions import package_versions

TOKENS, CORPUS = "tokens.int32", "corpus.json"
FORMAT = 1


def prepared(config: TrainConfig, start: Path, folder: Path, begun: bool, account: dict[str, Any]) -> Corpus:
    """The corpus that the branch trains on; all processes call this together.

    Args:
        start: checkpoint whose tokenizer is used
        folder: where the corpus is kept; specific to this work
        begun: checkpoints have been made with the kept corpus, so it is used even if versions have changed
        account: `data_account` as planned, which identifies the result
    """
    ranks.by_first(lambda: _prepare(config, start, folder, begun, account))
    machine.give_back_memory()  # of texts and tokens, gigabytes that nothing in the training would use again
    ranks.check_seen(folder / CORPUS, "give an outputs= (or out=) on a disk that all nodes share")
    return read(config, folder)


def _prepare(config: TrainConfig, start: Path, folder: Path, begun: bool, account: dict[str, Any]) -> None:
    kept = _kept(folder)
    if kept is not None and (begun or kept["packages"] == _versions()):
        ranks.say(f"{folder}: rows as an earlier run prepared them; delete it to have them graded again")
        return
    rows = read_branch(config)
    _check_unchanged(config, account)
    tokenizer = backbone.load_tokenizer(start)
    backbone.check_tokenizer(tokenizer, start)
    try:
        write(prepare(config, rows, tokenizer, backbone.context_length(start)), folder)
    finally:
        end_workers()  # which would keep 50 MB each during the whole training


def _check_unchanged(config: TrainConfig, account: dict[str, Any]) -> None:
    """Refuse files that changed since this run began: the manifest would identify other contents than were read."""
    for name, entry in data_account(config)["sources"].items():
        if entry["sha256"] != account["sources"][name]["sha256"]:
            raise UserError(f"{entry['path']}: has changed since this run began; run it again when the file is whole")


def write(corpus: Corpus, folder: Path) -> None:
    """Write the corpus to `folder` completely or not at all; raises UserError if the disk is full."""
    documents = [*corpus.documents, *(one for part in corpus.held_out.values() for one in part)]
    partial = folder.with_name(f".{folder.name}.partial")
    with whole_or_gone(partial, folder):
        for left in (partial, folder):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / TOKENS).open("wb") as file:
            for document in documents:
                file.write(document.tokens.astype("<i4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        facts: dict[str, Any] = {
            "format": FORMAT,
            "packages": _versions(),
            "sha256": file_sha256(partial / TOKENS),
            "documents": [(document.id, len(document), document.prompt_len) for document in documents],
            "held_out": {part: len(chosen) for part, chosen in corpus.held_out.items()},
            "account": corpus.account,
        }
        write_text(partial / CORPUS, json.dumps({**facts, "documents_sha256": _of_documents(facts)}))
        partial.rename(folder)


def read(config: TrainConfig, folder: Path) -> Corpus:
    """The corpus that `write` put into `folder`, with the plan of this configuration."""
    facts = _facts(folder)
    tokens = np.asarray(np.memmap(folder / TOKENS, dtype="<i4", mode="r"))
    borders = accumulate((length for _, length, _ in facts["documents"]), initial=0)
    documents = [
        Document(name, tokens[begin:end], prompt_len)
        for (name, _, prompt_len), (begin, end) in zip(facts["documents"], pairwise(borders), strict=True)
    ]
    counts: dict[str, int] = facts["held_out"]
    trained = len(documents) - sum(counts.values())
    rest = iter(documents[trained:])
    held_out = {part: list(islice(rest, count)) for part, count in counts.items()}
    documents = documents[:trained]
    plan = plan_of(config, documents)
    fingerprint = hashlib.sha256(f"{facts['sha256']} {plan.steps}".encode()).hexdigest()
    return Corpus(documents, plan, facts["account"], held_out, fingerprint)


def _kept(folder: Path) -> dict[str, Any] | None:
    """The facts of a corpus that an earlier run wrote there; None if there is none, or it is damaged."""
    if not folder.exists():
        return None
    try:
        facts = _facts(folder)
        documents = facts.get("documents_sha256")  # missing in older files
        whole = facts["sha256"] == file_sha256(folder / TOKENS) and documents in (None, _of_documents(facts))
        if facts["format"] == FORMAT and whole:
            return facts
    except (OSError, ValueError, KeyError, TypeError):
        pass
    ranks.say(f"warning: {folder}: not whole; preparing the rows again")
    return None


def _versions() -> dict[str, str]:
    """Versions of the packages and graders that rows and tokens depend on, besides settings and files."""
    return {**package_versions(), "graders": str(GRADING)}


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / CORPUS).read_text(encoding="utf-8"))
    return facts


def _of_documents(facts: dict[str, Any]) -> str:
    text = json.dumps([facts["documents"], facts["held_out"]])
    return hashlib.sha256(text.encode()).hexdigest()
