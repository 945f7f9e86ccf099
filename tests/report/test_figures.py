import math
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from branchmerge.evaluation.store import Score
from branchmerge.report.figures import EXPERTS, GREYS, MERGED, accuracy, colours
from branchmerge.report.tables import Row


def row(model: str, *values: float, stderr: float = 0.05) -> Row:
    return Row(
        model,
        tuple(
            Score(
                model=model, task=f"task_{number}", value=value, stderr=stderr, questions=100, no_answer=0.0,
                output_tokens=10.0, key={}, seconds=1.0, machine="a CPU", created="2026-01-01T00:00:00Z",
            )
            for number, value in enumerate(values)
        ),
    )  # fmt: skip


def test_each_kind_of_model_has_its_palette() -> None:
    models = ["backbone", "experts/math", "merged/a", "experts/code", "others/x-12", "merged/b"]
    assert colours(models) == [GREYS[0], EXPERTS[0], MERGED[0], EXPERTS[1], GREYS[1], MERGED[1]]


def test_palettes_share_no_colour() -> None:
    assert len({*GREYS, *EXPERTS, *MERGED}) == len(GREYS) + len(EXPERTS) + len(MERGED)


@pytest.mark.parametrize(("kind", "palette"), [("experts/", EXPERTS), ("merged/", MERGED), ("others/", GREYS)])
def test_more_models_than_colours_start_the_palette_again(kind: str, palette: tuple[str, ...]) -> None:
    models = [f"{kind}{number}" for number in range(len(palette) + 1)]
    assert colours(models) == [*palette, palette[0]]


def test_no_models_no_colours() -> None:
    assert colours([]) == []


def pixels(path: Path, colour: str) -> int:
    """How many pixels of a picture have a colour."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        found = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert found is not None
    return {rgb: count for count, rgb in found}.get(ImageColor.getrgb(colour), 0)


def test_figure_is_a_png_with_a_bar_for_every_model(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.png"
    accuracy([row("backbone", 0.1, 0.2), row("experts/math", 0.6, 0.2), row("merged/a", 0.6, 0.7)], path)
    with Image.open(path) as image:
        image.load()
        assert image.width >= 1000 and image.height >= 600
    # The bars' areas stand in the order of the means, 0.15, 0.4 and 0.65.
    areas = [pixels(path, colour) for colour in (GREYS[0], EXPERTS[0], MERGED[0])]
    assert 1000 < areas[0] < areas[1] < areas[2]
    assert pixels(path, MERGED[1]) == 0


def test_standard_errors_are_drawn_as_long_as_they_are(tmp_path: Path) -> None:
    dark = []
    for stderr in (0.0, 0.1, 0.2):
        path = tmp_path / f"{stderr}.png"
        accuracy([row("backbone", 0.5, 0.5, stderr=stderr)], path)
        with Image.open(path) as image:
            dark.append(sum(image.convert("L").histogram()[:0x70]))  # the bars are lighter
    assert dark[2] - dark[0] == pytest.approx(2 * (dark[1] - dark[0]), rel=0.1)
    assert dark[1] - dark[0] > 100


def test_unknown_standard_error_still_draws(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.png"
    accuracy([row("backbone", 0.5, stderr=math.nan)], path)
    assert pixels(path, GREYS[0]) > 1000


def test_figures_are_closed(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    accuracy([row("backbone", 0.5)], tmp_path / "accuracy.png")
    assert plt.get_fignums() == []
