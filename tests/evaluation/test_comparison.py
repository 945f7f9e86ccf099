"""Stored scores are compared question by question, and only where they answer the same questions in the same way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from branchmerge.evaluation.comparison import comparisons, samples
from branchmerge.evaluation.paired import compare, detectable, holm, questions_needed, samples_needed, spread
from branchmerge.evaluation.store import Score, write
from branchmerge.report.tables import comparison_cells

KEY: dict[str, Any] = {"task_version": "1.0", "docs_sha256": "ab", "sampling": {"temperature": 0.6}, "seed": 42,
                       "weights_sha256": "x"}  # fmt: skip
RIGHT = {
    ("backbone", "aime"): [[1, 0], [0, 0], [1, 1], [0, 1], [0, 0], [0, 1]],
    ("merged", "aime"): [[1, 1], [0, 1], [1, 1], [1, 1], [0, 0], [1, 1]],
    ("backbone", "gpqa"): [[1, 1], [0, 0], [1, 0], [0, 1], [1, 1], [0, 0]],
    ("merged", "gpqa"): [[1, 1], [0, 1], [1, 0], [0, 1], [1, 0], [0, 0]],
}
APART = {("one", "math"): [[1, 1], [1, 1], [0, 0], [0, 1]], ("other", "math"): [[0, 0], [1, 1], [1, 1], [1, 0]]}
"""Always right where the other is always wrong: such questions differ however often they are asked."""


def stored(root: Path, model: str, task: str, **key: Any) -> Score:
    found = (RIGHT | APART)[model, task]
    rows = [{"id": f"q{n}", "sample": k, "accuracy": float(x)} for n, q in enumerate(found) for k, x in enumerate(q)]
    score = Score(model, task, 0.5, 0.1, len(found), 0.0, 10.0, {**KEY, **key}, 1.0, "a CPU", "now", samples=2)
    write(root / model, score, rows)
    return score


@pytest.fixture
def scores(tmp_path: Path) -> list[Score]:
    return [stored(tmp_path, model, task) for model, task in RIGHT]


def test_every_model_is_compared_with_one_on_every_task(scores: list[Score], tmp_path: Path) -> None:
    found, refused = comparisons(scores, "backbone", tmp_path)
    assert refused == [] and [(one.model, one.against, one.task) for one in found] == [
        ("merged", "backbone", "aime"), ("merged", "backbone", "gpqa")
    ]  # fmt: skip
    expected = {task: compare(RIGHT["merged", task], RIGHT["backbone", task]) for task in ("aime", "gpqa")}
    adjusted = holm({task: one.p for task, one in expected.items()})
    for one in found:
        a, b = RIGHT["merged", one.task], RIGHT["backbone", one.task]
        assert (one.difference, one.p_holm) == (expected[one.task], adjusted[one.task])
        assert one.detectable == pytest.approx(detectable(spread(a, b), 6, 2))


def test_power_tells_the_samples_that_a_difference_takes(scores: list[Score], tmp_path: Path) -> None:
    found, _ = comparisons(scores, "backbone", tmp_path, power=0.8)
    for one in found:
        known = spread(RIGHT["merged", one.task], RIGHT["backbone", one.task])
        assert one.samples_needed == samples_needed(known, 6, 0.8) is not None
        assert one.questions_needed == questions_needed(known, 2, 0.8)
    found, _ = comparisons(scores, "backbone", tmp_path)
    assert [(one.samples_needed, one.questions_needed) for one in found] == [(None, None), (None, None)]
    assert all(comparison_cells(one)[-2:] == ["", ""] for one in found)


def test_where_no_number_of_samples_is_enough_the_questions_are_told(tmp_path: Path) -> None:
    (one,), _ = comparisons([stored(tmp_path, *key) for key in APART], "other", tmp_path, power=0.1)
    known = spread(*APART.values())
    assert detectable(known, 4, samples=10**9) > 0.1
    assert one.questions_needed is not None and detectable(known, one.questions_needed, 2) <= 0.1 * (1 + 1e-9)
    assert comparison_cells(one)[-2:] == ["none suffice", str(one.questions_needed)]


def test_questions_are_paired_by_their_ids_not_by_their_places(scores: list[Score], tmp_path: Path) -> None:
    usual, _ = comparisons(scores, "backbone", tmp_path)
    path = tmp_path / "merged" / "samples" / "aime.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    again, _ = comparisons(scores, "backbone", tmp_path)
    assert [one.difference for one in again] == [one.difference for one in usual]


@pytest.mark.parametrize(
    ("name", "other"),
    [("task_version", "2.0"), ("docs_sha256", "cd"), ("sampling", {"temperature": 0.0}), ("seed", 7)],
)
def test_scores_of_other_protocols_are_refused(scores: list[Score], tmp_path: Path, name: str, other: Any) -> None:
    scores[1] = stored(tmp_path, "merged", "aime", **{name: other})
    found, (said,) = comparisons(scores, "backbone", tmp_path)
    assert [one.task for one in found] == ["gpqa"]
    assert said.startswith("merged and backbone on aime: not comparable") and name in said
    assert found[0].p_holm == found[0].difference.p  # one test is left


def test_other_questions_and_missing_samples_are_refused(scores: list[Score], tmp_path: Path) -> None:
    path = tmp_path / "merged" / "samples" / "aime.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    scores[3] = replace(scores[3], missing=1)
    found, refused = comparisons(scores, "backbone", tmp_path)
    assert found == [] and len(refused) == 2
    assert "other questions" in refused[0] and "1 and 0 samples are missing" in refused[1]


def test_one_sample_a_question_tells_no_detectable_difference(scores: list[Score], tmp_path: Path) -> None:
    for model in ("backbone", "merged"):
        path = tmp_path / model / "samples" / "aime.jsonl"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if json.loads(line)["sample"] == 0))
    found, _ = comparisons(scores, "backbone", tmp_path)
    assert [one.detectable is None for one in found] == [True, False]
    assert samples(tmp_path / "merged", scores[1])["q0"] == [1.0]
