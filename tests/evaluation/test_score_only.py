"""Responses that are there, graded beside a run that goes on or after one that died; and those that failed."""

import json
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serving
from test_run import QUESTIONS, composed, right, samples_of, settings, short_waits, told

from branchmerge.errors import UserError
from branchmerge.evaluation.benchmark import load_benchmark
from branchmerge.evaluation.run import PACKAGES, evaluate
from branchmerge.report import write_report
from branchmerge.study import locked

__all__ = ["short_waits"]


def test_score_only_grades_what_is_there_and_asks_nothing(tmp_path: Path) -> None:
    def later_ones_fail(number: int, before: int, problem: Any) -> str | None:
        return None if number >= 4 else right(number, before, problem)

    with serving(Server(told("math", later_ones_fail))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        with pytest.raises(UserError, match="there is nothing to report"):
            evaluate(composed(*arguments, "score_only=true"))
        assert server.bodies == []
        evaluate(composed(*arguments, "allow_missing=true"))
        asked = len(server.bodies)
        (score,) = evaluate(composed(*arguments, "score_only=true"))
        assert (score.questions, score.missing, len(server.bodies)) == (4, 2, asked)


def test_score_only_throws_no_responses_away(tmp_path: Path) -> None:
    """Also with overwrite: nothing would generate them again."""
    with serving(Server(told("math", right))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        (first,) = evaluate(composed(*arguments))
        stored = tmp_path / "demo" / "scores" / "served" / "student" / "responses" / "demo_math.jsonl"
        before = stored.read_bytes()
        (again,) = evaluate(composed(*arguments, "score_only=true", "overwrite=true"))
        assert (again.value, again.questions, len(server.bodies)) == (first.value, QUESTIONS, QUESTIONS)
        assert stored.read_bytes() == before


def test_samples_lie_in_the_order_of_their_questions_however_they_came(tmp_path: Path) -> None:
    def first_comes_last(number: int, before: int, problem: Any) -> str | None:
        return None if number == 0 and before == 0 else right(number, before, problem)

    with serving(Server(told("math", first_comes_last))) as server:
        run = composed(*settings(server, tmp_path, "benchmark.tasks=[demo_math]"))
        evaluate(run)
    (task,) = load_benchmark(run)
    folder = tmp_path / "demo" / "scores" / "served" / "student" / "responses"
    came = [json.loads(line)["question"] for line in (folder / "demo_math.jsonl").read_text().splitlines()]
    asked = [request.question for request in task.requests(42)]
    assert came != asked == [row["id"] for row in samples_of(tmp_path, "demo_math")]


def test_other_packages_grade_again_and_another_task_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Server(told("math", right))) as server:
        run = composed(*settings(server, tmp_path, "benchmark.tasks=[demo_math]"))
        (first,) = evaluate(run)
        monkeypatch.setattr("branchmerge.evaluation.run.package_versions", lambda: {name: "99" for name in PACKAGES})
        (other,) = evaluate(run)
        assert other.key["packages"] == {name: "99" for name in PACKAGES} != first.key["packages"]
        assert (other.created, other.seconds) != (first.created, first.seconds) and len(server.bodies) == QUESTIONS
        monkeypatch.setattr("branchmerge.evaluation.benchmark.Benchmark.version", "99")
        (last,) = evaluate(run)
        assert last.key["task_version"] == "99" and len(server.bodies) == 2 * QUESTIONS


def test_score_only_neither_waits_for_a_run_that_goes_on_nor_disturbs_it(tmp_path: Path) -> None:
    with serving(Server(told("math", right))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        (whole,) = evaluate(composed(*arguments))
    folder = tmp_path / "demo" / "scores" / "served" / "student"
    stored, kept = folder / "responses" / "demo_math.jsonl", folder / "demo_math.json"
    kept.unlink()
    *lines, last = stored.read_bytes().splitlines(keepends=True)
    half = b"".join(lines) + last[:30]  # the other run is writing it
    stored.write_bytes(half)
    with locked(folder):
        (score,) = evaluate(composed(*arguments, "score_only=true"))
        assert (score.questions, score.missing) == (QUESTIONS - 1, 1)
        assert stored.read_bytes() == half and not kept.exists()
    (alone,) = evaluate(composed(*arguments, "score_only=true"))
    assert alone.value == score.value and kept.exists()
    kept.write_text(kept.read_text().replace('"value"', '"worth"'))  # of another version
    stored.write_bytes(b"".join(lines) + last)
    (again,) = evaluate(composed(*arguments, "score_only=true"))
    assert (again.value, again.questions) == (whole.value, QUESTIONS)


def test_the_report_beside_a_run_that_goes_on_has_no_samples_of_others(tmp_path: Path) -> None:
    with serving(Server(told("math", right))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        evaluate(composed(*arguments))
    folder = tmp_path / "demo" / "scores" / "served" / "student"
    page = "samples/served/student/demo_math.html"
    (folder / "demo_math.json").unlink()
    (folder / "samples" / "demo_math.jsonl").unlink()
    config = composed(*arguments, "score_only=true")
    with locked(folder):
        report = write_report(config, evaluate(config))
        assert page not in (report / "index.html").read_text() and "1.000" in (report / "index.html").read_text()
        assert not (report / page).exists()
    assert page in (write_report(config, evaluate(config)) / "index.html").read_text() and (report / page).exists()


def test_what_fails_is_counted_once(tmp_path: Path) -> None:
    """Though a task follows that has all its responses."""
    with serving(Server(told("code", right))) as server:
        evaluate(composed(*settings(server, tmp_path, "benchmark.tasks=[demo_code]")))
    with serving(Server(told("math", lambda *_: None))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math,demo_code]", "allow_missing=false")
        (tmp_path / "demo" / "scores" / "served" / "student" / "demo_code.json").unlink()
        with pytest.raises(UserError, match=f"^{QUESTIONS} samples could not be generated"):
            evaluate(composed(*arguments))
