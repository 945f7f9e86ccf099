import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from branchmerge.evaluation.comparison import Comparison
from branchmerge.evaluation.paired import Difference
from branchmerge.evaluation.store import Score
from branchmerge.report import tables

MODELS = ("backbone", "experts/math", "merged/math+code")
TASKS = ("demo_math", "demo_code")
VALUES = ((0.125, 0.25), (0.5, 0.25), (0.4375, 0.75))


def score(model: str, task: str, value: float, stderr: float = 0.03125) -> Score:
    return Score(
        model=model, task=task, value=value, stderr=stderr, questions=100, no_answer=0.0625, output_tokens=57.25,
        key={"weights_sha256": f"sha-of-{model}"}, seconds=12.5, machine="a CPU", created="2026-01-01T00:00:00Z",
    )  # fmt: skip


SCORES = [
    score(model, task, value)
    for model, values in zip(MODELS, VALUES, strict=True)
    for task, value in zip(TASKS, values, strict=True)
]
TABLE = tables.rows(SCORES)


def test_scores_are_grouped_by_model_in_the_order_they_come() -> None:
    assert tuple(row.model for row in TABLE) == MODELS
    assert tuple(tuple(score.value for score in row.scores) for row in TABLE) == VALUES


def test_mean_is_unweighted_with_its_standard_error() -> None:
    stderr = pytest.approx(math.sqrt(2) * 0.03125 / 2)
    assert [row.mean for row in TABLE] == [(0.1875, stderr), (0.375, stderr), (0.59375, stderr)]


def test_header_names_the_tasks_and_the_mean() -> None:
    assert tables.header(TABLE) == ["model", "demo_math", "demo_code", "mean"]


def test_cells_round_to_three_places() -> None:
    row = tables.Row("m", (score("m", "t", 0.12345, 0.00987), score("m", "u", 1.0, 0.0)))
    assert tables.cells(row) == ["m", "0.123 ± 0.010", "1.000 ± 0.000", "0.562 ± 0.005"]


def test_markdown_parses_back_to_the_numbers() -> None:
    lines = [re.split(r"\s*\|\s*", line.strip("| ")) for line in tables.as_markdown(TABLE).splitlines()]
    assert lines[0] == tables.header(TABLE)
    assert lines[1] == ["---"] * 4
    assert [line[0] for line in lines[2:]] == list(MODELS)
    for line, row in zip(lines[2:], TABLE, strict=True):
        pairs = [(s.value, s.stderr) for s in row.scores] + [row.mean]
        read = [tuple(float(part) for part in cell.split(" ± ")) for cell in line[1:]]
        assert read == [pytest.approx(pair, abs=5.1e-4) for pair in pairs]


def test_csv_parses_back_to_the_numbers() -> None:
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(TABLE))))
    assert len(lines) == len(SCORES)
    for line, s in zip(lines, SCORES, strict=True):
        assert (line["model"], line["task"], line["weights_sha256"]) == (s.model, s.task, f"sha-of-{s.model}")
        assert (float(line["accuracy"]), float(line["stderr"]), int(line["questions"])) == (s.value, s.stderr, 100)
        measured = (float(line["no_answer"]), float(line["output_tokens"]), float(line["seconds"]))
        assert measured == (0.0625, 57.25, 12.5)


def test_every_number_stands_under_its_own_head() -> None:
    """Each is another one, so that none can stand for its neighbour."""
    one = replace(
        score("m", "t", 0.5, 0.01), low=0.02, high=0.03, stderr_question=0.04, stderr_sampling=0.05, questions=6,
        samples=7, missing=8, no_answer=0.09, output_tokens=10.0, seconds=11.0,
        metrics={"truncated": 0.12, "pass@2": 0.13},
    )  # fmt: skip
    (line,) = csv.DictReader(io.StringIO(tables.as_csv(tables.rows([one]))))
    told = {head: value for head, value in line.items() if head not in ("model", "task", "weights_sha256", "metrics")}
    assert {head: float(value) for head, value in told.items()} == {
        "accuracy": 0.5, "stderr": 0.01, "low": 0.02, "high": 0.03, "stderr_question": 0.04, "stderr_sampling": 0.05,
        "questions": 6, "samples": 7, "missing": 8, "no_answer": 0.09, "truncated": 0.12, "output_tokens": 10,
        "seconds": 11,
    }  # fmt: skip
    assert json.loads(line["metrics"]) == {"pass@2": 0.13}


def test_every_number_of_a_comparison_stands_under_its_own_head() -> None:
    one = Comparison("m", "b", "t", Difference(0.01, 0.02, -0.03, 0.04, 0.05, 6), 0.07, 0.08, 9, 10)
    (line,) = csv.DictReader(io.StringIO(tables.comparisons_as_csv([one])))
    assert (line.pop("model"), line.pop("against"), line.pop("task")) == ("m", "b", "t")
    assert {head: float(value) for head, value in line.items()} == {
        "difference": 0.01, "stderr": 0.02, "low": -0.03, "high": 0.04, "p": 0.05, "p_holm": 0.07, "questions": 6,
        "detectable": 0.08, "samples_needed": 9, "questions_needed": 10,
    }  # fmt: skip
    cells = dict(zip(tables.COMPARISON, tables.comparison_cells(one), strict=True))
    assert cells == {
        "model": "m", "task": "t", "difference": "+0.010 ± 0.020", "95% interval": "-0.030 to +0.040", "p": "0.05",
        "p (Holm)": "0.07", "detectable": "0.080", "samples needed": "9", "questions needed": "10",
    }  # fmt: skip
    assert "| m | t | +0.010 ± 0.020 | -0.030 to +0.040 | 0.05 | 0.07 |" in tables.comparisons_as_markdown([one])


def test_csv_keeps_all_digits() -> None:
    text = tables.as_csv(tables.rows([score("m", "t", 1 / 3)]))
    (line,) = csv.DictReader(io.StringIO(text))
    assert float(line["accuracy"]) == 1 / 3


def printed(table: list[tables.Row], colour: bool = False) -> str:
    console = Console(width=200, file=io.StringIO(), force_terminal=colour)
    console.print(tables.as_rich(table, "the title"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_terminal_table_shows_every_cell() -> None:
    text = printed(TABLE)
    assert "the title" in text
    for row in TABLE:
        (line,) = (line for line in text.splitlines() if row.model in line)
        assert all(cell in line for cell in tables.cells(row))


def test_best_of_each_column_is_bold() -> None:
    cells = [column._cells for column in tables.as_rich(TABLE, "the title").columns[1:]]
    bold = [[str(cell).startswith("[bold]") for cell in column] for column in cells]
    assert bold == [[False, True, False], [False, False, True], [False, False, True]]


def test_bold_marks_are_not_printed_as_text() -> None:
    assert "[bold]" not in printed(TABLE)
    assert "\x1b[1m" in printed(TABLE, colour=True)


def test_brackets_in_a_name_are_printed_as_text() -> None:
    assert "model[v2]" in printed(tables.rows([score("model[v2]", "t", 0.5)]))
