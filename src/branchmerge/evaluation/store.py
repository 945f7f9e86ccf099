"""Scores on disk: scores/<model>/<task>.json with the graded samples beside it in samples/<task>.jsonl.

A score is valid for a model and settings if its `key` equals theirs and its own samples are stored. Samples are written
first and the score has their fingerprint, since a run killed in between leaves an older score beside new samples.
Responses as they were generated are in responses/<task>.jsonl (see sample_store.py).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from branchmerge.files import file_sha256, write_json, write_text, writing

RECORDED_LATER = ("model_files",)
"""Keys that older scores lack, and that are ignored for those."""


@dataclass(frozen=True)
class Score:
    """One model on one task."""

    model: str
    task: str
    value: float
    """Accuracy: the mean over the questions of the mean over their samples (avg@k, pass@1), a share."""
    stderr: float
    """Standard error of `value`, clustered by question."""
    questions: int
    no_answer: float
    """Share of the samples without a gradable answer."""
    output_tokens: float
    """Mean length of a response, in generated tokens."""
    key: dict[str, Any]
    """Everything that decides the value: weights, task version, questions, sampling, settings, package versions."""
    seconds: float
    """Time of generation, if there was any, and of grading."""
    machine: str
    created: str
    samples: int = 1
    """Samples of each question that were asked for."""
    missing: int = 0
    """Samples without a response; the score is that of the others."""
    low: float = math.nan
    high: float = math.nan
    """95% interval of `value`"""
    stderr_question: float = math.nan
    """Part of `stderr` that comes from the choice of questions"""
    stderr_sampling: float = math.nan
    """Part of `stderr` that comes from sampling; NaN for one sample a question"""
    metrics: dict[str, float] = field(default_factory=dict)
    """truncated (a share), pass@k, maj@k, and what single graders add"""
    token_source: str = ""
    """How `output_tokens` were counted"""
    samples_sha256: str = ""
    """SHA-256 of the file with its samples; empty in older scores"""


def read(folder: Path, task: str, key: Mapping[str, Any]) -> Score | None:
    """The finished score for this key; None if there is none that this version can read, or its samples are missing."""
    try:
        score = Score(**json.loads((folder / f"{task}.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # a new score takes its place
        return None
    known = {name: value for name, value in key.items() if name in score.key or name not in RECORDED_LATER}
    if score.key != json.loads(json.dumps(known)) or not _has_samples(folder, score):
        return None
    return score


def _has_samples(folder: Path, score: Score) -> bool:
    """Whether its own samples are stored; told by their fingerprint where it has one, as reading them takes longer."""
    if not score.samples_sha256:
        return samples_of(folder, score) is not None
    try:
        return file_sha256(_samples(folder, score.task)) == score.samples_sha256
    except OSError:
        return False


def samples_of(folder: Path, score: Score) -> list[dict[str, Any]] | None:
    """The stored samples of a score; None if they are missing, damaged, or belong to another score."""
    digest, rows = hashlib.sha256(), []
    try:
        with _samples(folder, score.task).open("rb") as lines:  # one by one, as 64 samples a question have gigabytes
            for line in lines:
                digest.update(line)
                if line != b"\n":
                    rows.append(json.loads(line))
    except (OSError, ValueError):
        return None
    return rows if score.samples_sha256 in ("", digest.hexdigest()) else None


def signed(score: Score, samples: Iterable[Mapping[str, Any]]) -> Score:
    """The score with the fingerprint of its samples."""
    return replace(score, samples_sha256=hashlib.sha256(_lines(samples).encode()).hexdigest())


def write(folder: Path, score: Score, samples: Iterable[Mapping[str, Any]]) -> None:
    """Store samples and score, each whole or not at all; raises UserError if the disk is full or not writable."""
    with writing(folder):
        write_text(_samples(folder, score.task), _lines(samples))
        write_json(folder / f"{score.task}.json", asdict(score))


def _samples(folder: Path, task: str) -> Path:
    return folder / "samples" / f"{task}.jsonl"


def _lines(samples: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
