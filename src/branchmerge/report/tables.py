"""The table of a report: a row a model, a column a benchmark, and their mean."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table as RichTable

from branchmerge.evaluation.stats import macro_mean
from branchmerge.evaluation.store import Score


@dataclass(frozen=True)
class Row:
    """One model: a score a task, and the unweighted mean over the tasks with its standard error."""

    model: str
    scores: tuple[Score, ...]

    @property
    def mean(self) -> tuple[float, float]:
        return macro_mean([score.value for score in self.scores], [score.stderr for score in self.scores])


def rows(scores: Sequence[Score]) -> list[Row]:
    """Group scores by model, in the order they come."""
    models = list(dict.fromkeys(score.model for score in scores))
    return [Row(model, tuple(score for score in scores if score.model == model)) for model in models]


def header(table: Sequence[Row]) -> list[str]:
    return ["model", *(score.task for score in table[0].scores), "mean"]


def cells(row: Row) -> list[str]:
    """One row in text: share of right answers ± standard error."""
    pairs = [(score.value, score.stderr) for score in row.scores] + [row.mean]
    return [row.model, *(f"{value:.3f} ± {stderr:.3f}" for value, stderr in pairs)]


def as_markdown(table: Sequence[Row]) -> str:
    lines = [header(table), ["---"] * len(header(table)), *(cells(row) for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(table: Sequence[Row]) -> str:
    """One line a model and task, with everything needed to compute with it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model", "task", "accuracy", "stderr", "questions", "no_answer", "output_tokens", "seconds", "weights_sha256"]
    )
    for row in table:
        for s in row.scores:
            weights = s.key["weights_sha256"]
            writer.writerow(
                [s.model, s.task, s.value, s.stderr, s.questions, s.no_answer, s.output_tokens, s.seconds, weights]
            )
    return out.getvalue()


def as_rich(table: Sequence[Row], title: str) -> RichTable:
    """For the terminal; the best of each column in bold."""
    rich = RichTable(title=title)
    for name in header(table):
        rich.add_column(name, justify="left" if name == "model" else "right")
    columns = [[score.value for score in row.scores] + [row.mean[0]] for row in table]
    best = [max(column) for column in zip(*columns, strict=True)]
    for row, values in zip(table, columns, strict=True):
        name, *texts = cells(row)
        marked = [
            f"[bold]{text}[/bold]" if value == top else text
            for text, value, top in zip(texts, values, best, strict=True)
        ]
        rich.add_row(name, *marked)
    return rich
