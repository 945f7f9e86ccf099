"""Scores on disk: scores/<model>/<task>.json with the graded samples beside it in samples/<task>.jsonl.

A score is valid for a model and settings if its `key` says so; the samples are written first, so a score never
stands without them. Responses as they were generated are in responses/<task>.jsonl (see sample_store.py).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from branchmerge.study import write_json, write_text


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
    """Generation, where there was any, and grading."""
    machine: str
    created: str
    samples: int = 1
    """Of each question, as asked for."""
    missing: int = 0
    """Samples that there is no response for; the score is of the others."""
    low: float = math.nan
    high: float = math.nan
    """95% interval of `value`"""
    stderr_question: float = math.nan
    """Part of `stderr` that comes from the choice of questions"""
    stderr_sampling: float = math.nan
    """Part of it that comes from drawing the samples; NaN for one sample a question"""
    metrics: dict[str, float] = field(default_factory=dict)
    """truncated (a share), pass@k, maj@k, and what single graders add"""
    token_source: str = ""
    """How `output_tokens` were counted"""


def read(folder: Path, task: str, key: Mapping[str, Any]) -> Score | None:
    """The finished score for this key, None where there is none that this version can read."""
    try:
        score = Score(**json.loads((folder / f"{task}.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # a new score takes its place
        return None
    return score if score.key == json.loads(json.dumps(key)) else None


def write(folder: Path, score: Score, samples: Iterable[Mapping[str, Any]]) -> None:
    """Store samples and score, each whole or not at all."""
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    write_text(folder / "samples" / f"{score.task}.jsonl", "".join(lines))
    write_json(folder / f"{score.task}.json", asdict(score))
