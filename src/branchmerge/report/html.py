"""Write the report of an evaluation: index.html, report.md, scores.csv, figures/."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from rich.console import Console

from branchmerge.config import EvaluateConfig
from branchmerge.evaluation import backends, comparison
from branchmerge.evaluation.comparison import Comparison
from branchmerge.evaluation.store import Score
from branchmerge.files import unwritable, write_text, writing
from branchmerge.report import figures, samples, tables
from branchmerge.study import Study


def write_report(config: EvaluateConfig, scores: Sequence[Score]) -> Path:
    """Write the report, print its table and its path; returns its folder.

    Raises:
        UserError: its disk is full or not writable
    """
    folder = report_folder(config)
    with writing(folder):
        _write(config, scores, folder)
    table = tables.as_rich(tables.rows(scores), f"study {config.study.name}, accuracy ± standard error")
    Console(width=max(100, Console().width)).print(table)
    print(f"report: {folder / 'index.html'}", flush=True)
    return folder


def report_folder(config: EvaluateConfig) -> Path:
    """Where the report goes: the study's report/, or `out=`; made here, to be told of it before hours of work.

    Raises:
        UserError: it cannot be made
    """
    folder = Path(config.out).expanduser() if config.out is not None else Study(config).report
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as in /proc, which takes no folders
            raise unwritable(folder, error) from error
    return folder


def _write(config: EvaluateConfig, scores: Sequence[Score], folder: Path) -> None:
    study = Study(config)
    table = tables.rows(scores)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    figures.accuracy(table, folder / "figures" / "accuracy.png")
    against = config.against or table[0].model
    compared, refused = comparison.comparisons(scores, against, study.root / "scores", config.power)
    facts = [*_facts(config, scores), *(("no comparison", said) for said in refused)]
    write_text(folder / "scores.csv", tables.as_csv(table))
    write_text(folder / "comparisons.csv", tables.comparisons_as_csv(compared))
    write_text(folder / "report.md", _markdown(config, table, compared, facts))
    environment = Environment(loader=PackageLoader("branchmerge.report", "."), autoescape=True)
    page = environment.get_template("report.html.j2")
    links = samples.write_pages(environment, list(scores), study.root / "scores", folder)
    write_text(
        folder / "index.html",
        page.render(
            config=config,
            table=table,
            header=tables.header(table),
            cells=tables.cells,
            facts=facts,
            links=links,
            compared=compared,
            comparison_header=tables.COMPARISON,
            comparison_cells=tables.comparison_cells,
            against=against,
        ),
    )


def _facts(config: EvaluateConfig, scores: Sequence[Score]) -> list[tuple[str, str]]:
    """The facts that a reader needs in order to trust the table."""
    first = scores[0]
    tasks = {score.task: score for score in scores}
    levels = {score.key["sandbox"] for score in scores if score.key["sandbox"]}
    packages = ", ".join(f"{name} {version}" for name, version in first.key["packages"].items())
    return [
        ("benchmark", ", ".join(_size(score) for score in tasks.values())),
        ("generation", "; ".join(f"{name}: {_words(score.key['sampling'])}" for name, score in tasks.items())),
        ("error", "± is the standard error, clustered by question; the mean's assumes independent benchmarks"),
        ("backend", f"{_words(backends.facts(config.backend))}, {first.machine}; length in {first.token_source}"),
        ("sandbox", ", ".join(sorted(levels)) or "no programs were run"),
        ("packages", packages),
        ("scoring took", f"{sum(score.seconds for score in scores):.0f} s"),
        ("written", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
    ]


def _size(score: Score) -> str:
    missing = f", {score.missing} samples missing" if score.missing else ""
    return f"{score.task} ({score.questions} questions, {score.samples} samples each{missing})"


def _words(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def _markdown(
    config: EvaluateConfig,
    table: Sequence[tables.Row],
    compared: Sequence[Comparison],
    facts: Sequence[tuple[str, str]],
) -> str:
    lines = "".join(f"- {name}: {text}\n" for name, text in facts)
    return (
        f"# Report of the study {config.study.name}\n\n{tables.as_markdown(table)}\n"
        f"![accuracy](figures/accuracy.png)\n\n{tables.comparisons_as_markdown(compared)}\n{lines}"
    )
