"""The figures of a merge's anatomy, drawn from the content of anatomy.json."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from branchmerge.merge.density import modules_in_order

SAME_SIGN, TAKEN = "#9aa0a6", "#4285a8"
NAN = float("nan")


def draw(summary: Mapping[str, Any], folder: Path) -> None:
    """Draw the figures for which the summary has numbers."""
    if summary["selects"]:
        _heat_maps(summary, "density", "share of values not Left's", folder / "density_by_layer.png")
    else:
        _heat_maps(summary, "relative_update", "|out - Left| / |Left|", folder / "update_by_layer.png")
    if "cosines" in summary:
        _cosines(summary["cosines"], folder / "task_vector_cosines.png")
    if summary["selects"] or "same_sign" in summary:
        _contributions(summary, folder / "contributions.png")


def _heat_maps(summary: Mapping[str, Any], key: str, label: str, path: Path) -> None:
    """One panel per node of the tree: layers downwards, types of modules to the right."""
    nodes = summary["nodes"]
    places = next(iter(nodes.values()))["places"]
    modules = modules_in_order(place["module"] for place in places)
    layers: list[int | None] = sorted({place["layer"] for place in places if place["layer"] is not None})
    if any(place["layer"] is None for place in places):
        layers.append(None)  # tensors outside of the layers, in the last row
    size = (0.42 * len(modules) + 1.6) * len(nodes) + 1.0, min(1.9 + 0.17 * len(layers), 14.0)
    figure, panels = plt.subplots(1, len(nodes), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axes, (name, node) in zip(panels[0], nodes.items(), strict=True):
        values = [[NAN] * len(modules) for _ in layers]
        for place in node["places"]:
            values[layers.index(place["layer"])][modules.index(place["module"])] = place[key]
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label(label, fontsize=9)
        bar.ax.tick_params(labelsize=8)
        axes.set_title(f"{name} ({key.replace('_', ' ')} {node[key]:.3g} in all)", fontsize=9)
        axes.set_xticks(range(len(modules)), modules, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.spines[:].set_visible(False)
    step = max(1, len(layers) // 16)
    rows = [row for row, layer in enumerate(layers) if layer is None or row % step == 0]
    panels[0][0].set_yticks(rows, ["outside" if layers[row] is None else layers[row] for row in rows], fontsize=8)
    panels[0][0].set_ylabel("layer")
    _save(figure, path)


def _cosines(cosines: Mapping[str, float | None], path: Path) -> None:
    """Matrix of the cosines between task vectors, the merged model's update among them."""
    names = list(dict.fromkeys(name for pair in cosines for name in pair.split(" ")))
    found = {frozenset(pair.split(" ")): value for pair, value in cosines.items()}
    figure, axes = _square(len(names))
    _matrix(axes, names, lambda a, b: 1.0 if a == b else found[frozenset((a, b))], "RdBu_r", (-1.0, 1.0))
    axes.set_title("cosine between task vectors W - W₀", fontsize=10)
    _save(figure, path)


def _contributions(summary: Mapping[str, Any], path: Path) -> None:
    """What each expert contributes: shares as bars; for operators that select, the overlaps as a matrix."""
    names = list(summary["taken"])
    bars = [("merged value is the expert's, where experts differ", "taken", TAKEN)] if summary["selects"] else []
    bars += (
        [("expert's change has the sign of the merged model's", "same_sign", SAME_SIGN)]
        if "same_sign" in summary
        else []
    )
    columns = 1 + summary["selects"]
    figure, panels = plt.subplots(
        1, columns, figsize=(0.7 * len(names) + 2.6 + (0.8 * len(names) + 1.4) * (columns - 1), 3.8),
        layout="constrained", squeeze=False, width_ratios=[1.25, 1][:columns],
    )  # fmt: skip
    axes = panels[0][0]
    width = 0.8 / len(bars)
    for number, (label, key, colour) in enumerate(bars):
        left = [place - 0.4 + (number + 0.5) * width for place in range(len(names))]
        drawn = axes.bar(left, [_or_nan(summary[key][name]) for name in names], width * 0.92, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(0, 1.0)
    axes.set_ylabel("share of the coordinates")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside lower left", ncols=1)
    if summary["selects"]:
        found = {frozenset(pair.split(" ")): value for pair, value in summary["overlap"].items()}
        _matrix(panels[0][1], names, lambda a, b: None if a == b else found[frozenset((a, b))], "Blues", (0.0, 1.0))
        panels[0][1].set_title("overlap of what is taken\n(Jaccard)", fontsize=9)
    _save(figure, path)


def _matrix(
    axes: Axes,
    names: Sequence[str],
    value: Callable[[str, str], float | None],
    colours: str,
    limits: tuple[float, float],
) -> None:
    """Names by names, each cell with its number; empty where there is none."""
    rows = [[_or_nan(value(a, b)) for b in names] for a in names]
    axes.imshow(rows, cmap=colours, vmin=limits[0], vmax=limits[1])
    for y, row in enumerate(rows):
        for x, number in enumerate(row):
            if number == number:
                dark = abs(number) > 0.6
                axes.text(
                    x, y, f"{number:z.2f}", ha="center", va="center", fontsize=9, color="white" if dark else "black"
                )
    axes.set_xticks(range(len(names)), names, fontsize=9, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.spines[:].set_visible(False)


def _square(count: int) -> tuple[Figure, Axes]:
    side = 0.75 * count + 1.4
    return plt.subplots(figsize=(side, side * 0.95), layout="constrained")


def _or_nan(value: float | None) -> float:
    return NAN if value is None else value


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, metadata={"Software": None})  # no version of matplotlib: the same bytes
    finally:  # also on a full disk
        plt.close(figure)
