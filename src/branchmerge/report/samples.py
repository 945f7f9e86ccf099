"""Pages of samples: one per model and task, with the prompts, the responses and their verdicts."""

from pathlib import Path

from jinja2 import Environment

from branchmerge.evaluation.store import Score, samples_of
from branchmerge.files import write_text


def write_pages(environment: Environment, scores: list[Score], root: Path, folder: Path) -> dict[tuple[str, str], str]:
    """Write the pages of a report.

    Args:
        root: the folder of the scores, with one folder per model
        folder: the folder of the report

    Returns:
        By model and task, the path of the page relative to the report. A score has none if its samples are not stored,
        for example while its run is going on.
    """
    template = environment.get_template("samples.html.j2")
    pages = {}
    for score in scores:
        place = f"samples/{score.model}/{score.task}.html"
        rows = samples_of(root / score.model, score)
        if rows is None:
            continue
        write_text(folder / place, template.render(score=score, rows=rows, up="../" * place.count("/")))
        pages[score.model, score.task] = place
    return pages
