"""The demo study itself, as `make demo` runs it: minutes long, so marked slow."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_shows_the_effect_of_branching_and_merging(tmp_path: Path) -> None:
    """Every expert is the best in its own domain, and the merged model beats the backbone in the mean."""
    for command in (["train.py", "-m", "domain=math,code,science"], ["merge.py"], ["evaluate.py"]):
        subprocess.run([sys.executable, *command, f"outputs={tmp_path}"], cwd=PROJECT, check=True)
    with (tmp_path / "demo" / "report" / "scores.csv").open() as lines:
        scores = {(row["model"], row["task"]): float(row["accuracy"]) for row in csv.DictReader(lines)}
    domains = ("math", "code", "science")
    for domain in domains:
        column = {name: scores[name, f"demo_{domain}"] for name in ("backbone", *(f"experts/{d}" for d in domains))}
        assert max(column, key=lambda name: column[name]) == f"experts/{domain}"
    means = {name: sum(scores[name, f"demo_{d}"] for d in domains) for name in ("backbone", "merged/arcee_fusion")}
    assert means["merged/arcee_fusion"] > means["backbone"]
