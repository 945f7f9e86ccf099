"""The figures of a report."""

from collections.abc import Sequence
from pathlib import Path

from branchmerge.report.tables import Row

GREYS = ("#9aa0a6", "#5f6368")
EXPERTS = ("#4285a8", "#6aa84f", "#c27ba0", "#b7950b", "#7d6b91")
MERGED = ("#d9480f", "#f08c00", "#a61e4d", "#e8590c", "#862e9c")


def accuracy(table: Sequence[Row], path: Path) -> None:
    """Bars of accuracy with standard errors: one group per benchmark and one for the mean, one bar per model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = [score.task for score in table[0].scores] + ["mean"]
    width = 0.84 / len(table)
    figure, axes = plt.subplots(figsize=(max(7.0, 0.32 * len(table) * len(groups) + 2.5), 4.2), layout="constrained")
    for number, (row, colour) in enumerate(zip(table, colours([row.model for row in table]), strict=True)):
        pairs = [(score.value, score.stderr) for score in row.scores] + [row.mean]
        left = [group - 0.42 + (number + 0.5) * width for group in range(len(groups))]
        heights, errors = zip(*pairs, strict=True)
        axes.bar(left, heights, width * 0.92, yerr=errors, color=colour, label=row.model,
                 error_kw={"elinewidth": 0.8, "ecolor": "#333333"})  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy (± standard error)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    try:
        figure.savefig(path, dpi=150)
    finally:  # also on a full disk
        plt.close(figure)


def colours(models: Sequence[str]) -> list[str]:
    """Colours of the models: cool for experts, warm for merged models, grey for backbones and others."""
    chosen: list[str] = []
    used = {"experts": 0, "merged": 0, "": 0}
    palettes = {"experts": EXPERTS, "merged": MERGED, "": GREYS}
    for model in models:
        kind = model.split("/")[0] if model.startswith(("experts/", "merged/")) else ""
        chosen.append(palettes[kind][used[kind] % len(palettes[kind])])
        used[kind] += 1
    return chosen
