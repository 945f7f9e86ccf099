"""Scores on disk: scores/<model>/<task>.json with the samples beside it in samples/<task>.jsonl.

A score is valid for a model and settings if its `key` says so; the samples are written first, so a score never
stands without them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from branchmerge.study import write_json, write_text


@dataclass(frozen=True)
class Score:
    """One model on one task."""

    model: str
    task: str
    value: float
    """Accuracy: the mean over the questions, a share."""
    stderr: float
    """Standard error of `value`, over the questions."""
    questions: int
    no_answer: float
    """Share of the questions without a gradable answer."""
    output_tokens: float
    """Mean length of the response, in tokens of the model's tokenizer (re-tokenised text)."""
    key: dict[str, Any]
    """Everything that decides the value: weights, task version, settings, package versions."""
    seconds: float
    """Generation and grading."""
    machine: str
    created: str


def read(folder: Path, task: str, key: Mapping[str, Any]) -> Score | None:
    """The finished score for this key, None where there is none."""
    path = folder / f"{task}.json"
    if not path.is_file():
        return None
    score = Score(**json.loads(path.read_text()))
    return score if score.key == json.loads(json.dumps(key)) else None


def write(folder: Path, score: Score, samples: Iterable[Mapping[str, Any]]) -> None:
    """Store samples and score, each whole or not at all."""
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    write_text(folder / "samples" / f"{score.task}.jsonl", "".join(lines))
    write_json(folder / f"{score.task}.json", asdict(score))
