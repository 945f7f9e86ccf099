"""Output of a merge's anatomy: lines for the terminal, a table for the model card, anatomy.json, figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchmerge.files import write_json
from branchmerge.merge import density
from branchmerge.merge.anatomy import Anatomy, in_words
from branchmerge.merge.recipe import Recipe

FILE = "anatomy.json"
FIGURES = "figures"


@dataclass(frozen=True)
class AnatomyText:
    """The anatomy for a reader: lines for the terminal, and markdown for the model card."""

    lines: list[str]
    nodes: Mapping[str, density.Change]

    @property
    def markdown(self) -> str:
        """A table of the nodes, and the lines as paragraphs."""
        rows = [
            f"| `{node}` | {change.density:.3f} | {change.relative_update:.2e} |" for node, change in self.nodes.items()
        ]
        head = ["| node of the tree | share of values that are not Left's | norm of the update / norm of Left |"]
        paragraphs = [
            "\n".join([*head, "|---|---|---|", *rows]),
            *(f"{line[0].upper()}{line[1:]}" for line in self.lines),
        ]
        return "\n\n".join(paragraphs) + "\n"


def write(recipe: Recipe, table: Sequence[Mapping[str, Any]], anatomy: Anatomy | None, out: Path) -> AnatomyText:
    """Write the anatomy into a checkpoint folder, as far as the recipe asks for it."""
    nodes = density.by_node(table)
    if anatomy is None:
        return AnatomyText([], nodes)
    # Imported here, because a merge without an anatomy does not need it.
    from branchmerge.merge import anatomy_figures

    summary = anatomy.summary() | {"selects": recipe.operator.selects, "nodes": _nodes(table, nodes)}
    write_json(out / FILE, summary)
    (out / FIGURES).mkdir()
    anatomy_figures.draw(summary, out / FIGURES)
    return AnatomyText(in_words(summary, recipe.operator.selects), nodes)


def _nodes(table: Sequence[Mapping[str, Any]], nodes: Mapping[str, density.Change]) -> dict[str, Any]:
    """Each node's change in total and by place."""
    return {
        node: {
            "density": total.density,
            "relative_update": total.relative_update,
            "places": [
                {"layer": layer, "module": module, "density": change.density,
                 "relative_update": change.relative_update, "elements": change.elements}
                for (layer, module), change in density.by_place(table, node).items()
            ],
        }
        for node, total in nodes.items()
    }  # fmt: skip
