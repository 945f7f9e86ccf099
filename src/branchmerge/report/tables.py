"""The table of a report: one row per model, one column per benchmark, and their mean."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table as RichTable

from branchmerge.evaluation.comparison import Comparison
from branchmerge.evaluation.stats import macro_mean
from branchmerge.evaluation.store import Score


@dataclass(frozen=True)
class Row:
    """One model: a score per task, and the unweighted mean over the tasks with its standard error."""

    model: str
    scores: tuple[Score, ...]

    @property
    def mean(self) -> tuple[float, float]:
        return macro_mean([score.value for score in self.scores], [score.stderr for score in self.scores])


def rows(scores: Sequence[Score]) -> list[Row]:
    """Group scores by model, in the given order."""
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
    """One line per model and task, with all numbers at full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model", "task", "accuracy", "stderr", "low", "high", "stderr_question", "stderr_sampling", "questions",
         "samples", "missing", "no_answer", "truncated", "output_tokens", "metrics", "seconds", "weights_sha256"]
    )  # fmt: skip
    for row in table:
        for s in row.scores:
            others = json.dumps({name: value for name, value in s.metrics.items() if name != "truncated"})
            writer.writerow(
                [s.model, s.task, s.value, s.stderr, s.low, s.high, s.stderr_question, s.stderr_sampling, s.questions,
                 s.samples, s.missing, s.no_answer, s.metrics.get("truncated", ""), s.output_tokens, others, s.seconds,
                 s.key["weights_sha256"]]
            )  # fmt: skip
    return out.getvalue()


COMPARISON = ("model", "task", "difference", "95% interval", "p", "p (Holm)", "detectable", "samples needed",
              "questions needed")  # fmt: skip


def comparison_cells(one: Comparison) -> list[str]:
    """One comparison in text."""
    d = one.difference
    least = "" if one.detectable is None else f"{one.detectable:.3f}"
    interval = f"{d.low:+.3f} to {d.high:+.3f}"
    questions = "" if one.questions_needed is None else str(one.questions_needed)
    none = "none suffice" if questions else ""  # no number of samples is enough; or it was not asked
    samples = none if one.samples_needed is None else str(one.samples_needed)
    said = f"{d.mean:+.3f} ± {d.stderr:.3f}"
    return [one.model, one.task, said, interval, f"{d.p:.3g}", f"{one.p_holm:.3g}", least, samples, questions]


def comparisons_as_markdown(compared: Sequence[Comparison]) -> str:
    """The table of comparisons; empty if there are none."""
    if not compared:
        return ""
    lines = [list(COMPARISON), ["---"] * len(COMPARISON), *map(comparison_cells, compared)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"Differences from {compared[0].against}, paired by question:\n\n{table}"


def comparisons_as_csv(compared: Sequence[Comparison]) -> str:
    """One line per pair of models and task."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["model", "against", "task", "difference", "stderr", "low", "high", "p", "p_holm", "questions", "detectable",
         "samples_needed", "questions_needed"]
    )  # fmt: skip
    for one in compared:
        d = one.difference
        writer.writerow(
            [one.model, one.against, one.task, d.mean, d.stderr, d.low, d.high, d.p, one.p_holm, d.questions,
             one.detectable, one.samples_needed, one.questions_needed]
        )  # fmt: skip
    return out.getvalue()


def as_rich(table: Sequence[Row], title: str) -> RichTable:
    """The table for the terminal; the best value of each column in bold."""
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
        rich.add_row(escape(name), *marked)
    return rich
