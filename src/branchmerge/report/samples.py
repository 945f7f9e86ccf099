"""Pages to read samples on: a page a model and task, with what was asked, what was said, and how it was graded."""

from pathlib import Path

from jinja2 import Environment

from branchmerge.evaluation.store import Score, samples_of
from branchmerge.files import write_text


def write_pages(environment: Environment, scores: list[Score], root: Path, folder: Path) -> dict[tuple[str, str], str]:
    """Write the pages of a report.

    Args:
        root: the folder of the scores, a folder a model
        folder: the report's

    Returns:
        By model and task: where the page lies, relative to the report. There is none where a score's samples are not
        stored, as of a run that goes on.
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
