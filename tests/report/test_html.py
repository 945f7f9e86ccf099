"""Where a report cannot be written, and scores neither: one line, and nothing half-written."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from hydra import compose, initialize_config_dir
from matplotlib import pyplot as plt

from branchmerge import config
from branchmerge.config_checks import typed
from branchmerge.errors import UserError
from branchmerge.evaluation.store import Score, signed, write
from branchmerge.report import report_folder, write_report

KEY: dict[str, Any] = {"sandbox": None, "packages": {}, "sampling": {}, "weights_sha256": "ab12"}
SAMPLES = [{"id": "q", "messages": [], "response": "204", "accuracy": 1.0, "reason": "", "truncated": 0.0}]
SCORE = signed(Score("merged/a", "aime24", 1.0, 0.1, 1, 0.0, 9.0, KEY, 1.0, "a CPU", "now"), SAMPLES)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as place:
        yield place


def fill(path: Path, room: int) -> None:
    """Leave so many bytes on a disk."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            file.truncate(max(file.tell() - room, 0))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_report_where_no_folder_can_be_made_is_told_in_a_line() -> None:
    with pytest.raises(UserError, match="/proc: cannot write x there"):
        report_folder(config.EvaluateConfig(out="/proc/x"))


def test_a_report_tells_what_is_missing_and_against_which_model_it_compares(tmp_path: Path) -> None:
    config.register()
    asked = [f"outputs={tmp_path}", "against=merged/b"]
    with initialize_config_dir(str(config.PROJECT / "conf"), version_base="1.3"):
        settings = typed(compose("evaluate", overrides=asked), config.EvaluateConfig)
    scores = []
    for model, right in (("merged/a", [1.0, 1.0, 1.0]), ("merged/b", [1.0, 0.0, 0.0])):
        for task, missing in (("aime24", 0), ("aime25", 3)):
            rows = [{**SAMPLES[0], "id": f"q{n}", "sample": 0, "accuracy": one} for n, one in enumerate(right)]
            key = {**KEY, "task_version": "1", "docs_sha256": "ab", "seed": 42}
            one = replace(SCORE, model=model, task=task, value=sum(right) / 3, questions=3, missing=missing, key=key)
            scores.append(signed(one, rows))
            write(tmp_path / "demo" / "scores" / model, scores[-1], rows)
    report = write_report(settings, scores)
    for name in ("report.md", "index.html"):
        text = (report / name).read_text()
        assert "aime24 (3 questions, 1 samples each), aime25 (3 questions, 1 samples each, 3 samples missing)" in text
        assert "Differences from merged/b" in text
        assert "merged/a and merged/b on aime25: not comparable, 3 and 3 samples are missing" in text
    with (report / "comparisons.csv").open() as lines:
        (line,) = csv.DictReader(lines)
    assert (line["model"], line["against"], line["task"]) == ("merged/a", "merged/b", "aime24")
    assert float(line["difference"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("room", [0, 8192, 32768])
def test_a_full_disk_is_told_in_a_line_and_the_same_report_follows(tmp_path: Path, disk: Path, room: int) -> None:
    config.register()
    with initialize_config_dir(str(config.PROJECT / "conf"), version_base="1.3"):
        chosen = compose("evaluate", overrides=[f"outputs={tmp_path}", f"out={disk / 'report'}"])
        settings = typed(chosen, config.EvaluateConfig)
    write(tmp_path / "demo" / "scores" / SCORE.model, SCORE, SAMPLES)
    fill(disk / "hog", room)
    with pytest.raises(UserError, match=r"cannot write report there \(No space left on device\); make room") as raised:
        write_report(settings, [SCORE])
    assert "\n" not in str(raised.value) and not [name for name in files(disk) if "partial" in name]
    with pytest.raises(UserError, match=r"cannot write scores there \(No space left on device\); make room"):
        write(disk / "scores", SCORE, [{"response": "x" * 100_000}])
    assert not [name for name in files(disk) if "partial" in name or "scores/" in name]
    assert plt.get_fignums() == []
    (disk / "hog").unlink()
    write_report(settings, [SCORE])
    assert {"report/index.html", "report/scores.csv", "report/figures/accuracy.png"} <= set(files(disk))
