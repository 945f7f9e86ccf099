import dataclasses
import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchmerge.evaluation.store import Score, read, samples_of, signed, write

KEY: dict[str, Any] = {"weights_sha256": "ab12", "limit": None, "until": ("<|im_end|>",), "packages": {"torch": "2.10"}}
SCORE = Score(
    model="experts/math", task="demo_math", value=0.42, stderr=0.05, questions=100, no_answer=0.01,
    output_tokens=57.25, key=KEY, seconds=12.5, machine="a CPU", created="2026-01-01T00:00:00Z",
)  # fmt: skip
SAMPLES = [{"id": "q1", "response": "é \\boxed{1}\n"}, {"id": "q2", "response": "<think>"}]


def test_written_score_is_read_back_for_the_same_key(tmp_path: Path) -> None:
    write(tmp_path, SCORE, SAMPLES)
    found = read(tmp_path, "demo_math", KEY)
    assert repr(found) == repr(dataclasses.replace(SCORE, key=json.loads(json.dumps(KEY))))  # some of it is NaN


@pytest.mark.parametrize(
    "other", [{**KEY, "weights_sha256": "cd34"}, {**KEY, "limit": 5}, {**KEY, "more": 1}, {"limit": None}, {}]
)
def test_score_of_another_key_is_not_taken(tmp_path: Path, other: dict[str, Any]) -> None:
    write(tmp_path, SCORE, SAMPLES)
    assert read(tmp_path, "demo_math", other) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"\xff\xfe" * 9),
        lambda path: path.write_text(path.read_text() * 2),  # whole lines: nothing of it looks damaged
        lambda path: path.write_text(path.read_text().split("\n")[0] + "\n"),
    ],
    ids=["lost", "cut", "garbage", "twice", "fewer"],
)
def test_a_score_without_its_own_samples_is_not_taken(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    score = signed(SCORE, SAMPLES)
    write(tmp_path, score, SAMPLES)
    assert read(tmp_path, "demo_math", KEY) is not None and samples_of(tmp_path, score) == SAMPLES
    damage(tmp_path / "samples" / "demo_math.jsonl")
    assert read(tmp_path, "demo_math", KEY) is None and samples_of(tmp_path, score) is None


def test_whether_a_score_is_there_is_told_without_its_samples_in_memory(tmp_path: Path) -> None:
    samples = [{"id": f"q{n}", "response": "x" * 100_000} for n in range(100)]
    score = signed(SCORE, samples)
    write(tmp_path, score, samples)
    tracemalloc.start()
    found = read(tmp_path, "demo_math", KEY)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found is not None and most < 1_000_000


def test_samples_are_read_without_a_copy_of_their_file(tmp_path: Path) -> None:
    samples = [{"id": f"q{n}", "response": "x" * 100_000} for n in range(100)]
    score = signed(SCORE, samples)
    write(tmp_path, score, samples)
    tracemalloc.start()
    assert samples_of(tmp_path, score) is not None
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1.2 * 10_000_000  # the rows themselves


def test_scores_from_before_are_what_they_are(tmp_path: Path) -> None:
    """Without a fingerprint of their samples, and of the model's files."""
    write(tmp_path, SCORE, SAMPLES)
    assert read(tmp_path, "demo_math", {**KEY, "model_files": "ef56"}) is not None
    (tmp_path / "samples" / "demo_math.jsonl").unlink()
    assert read(tmp_path, "demo_math", KEY) is None


def test_missing_score_is_none(tmp_path: Path) -> None:
    write(tmp_path, SCORE, SAMPLES)
    assert read(tmp_path, "demo_code", KEY) is None
    assert read(tmp_path / "nowhere", "demo_math", KEY) is None


def test_samples_lie_beside_the_score_one_a_line(tmp_path: Path) -> None:
    write(tmp_path, SCORE, SAMPLES)
    lines = (tmp_path / "samples" / "demo_math.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == SAMPLES
    assert lines[-1] == ""


def test_new_score_replaces_the_old_one_and_its_samples(tmp_path: Path) -> None:
    write(tmp_path, SCORE, SAMPLES)
    key = {**KEY, "weights_sha256": "cd34"}
    write(tmp_path, dataclasses.replace(SCORE, value=0.5, key=key), SAMPLES[:1])
    found = read(tmp_path, "demo_math", key)
    assert found is not None
    assert found.value == 0.5
    assert read(tmp_path, "demo_math", KEY) is None
    assert len((tmp_path / "samples" / "demo_math.jsonl").read_text().splitlines()) == 1


def test_scores_of_two_tasks_stand_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, SCORE, SAMPLES)
    write(tmp_path, dataclasses.replace(SCORE, task="demo_code", value=0.1), SAMPLES)
    found = [read(tmp_path, task, KEY) for task in ("demo_math", "demo_code")]
    assert [score.value for score in found if score is not None] == [0.42, 0.1]


def test_unknown_standard_error_survives(tmp_path: Path) -> None:
    write(tmp_path, dataclasses.replace(SCORE, stderr=math.nan), SAMPLES)
    found = read(tmp_path, "demo_math", KEY)
    assert found is not None
    assert math.isnan(found.stderr)


def test_samples_that_cannot_be_written_leave_no_score(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write(tmp_path, SCORE, [*SAMPLES, {"id": object()}])
    assert read(tmp_path, "demo_math", KEY) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
