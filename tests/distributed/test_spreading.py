"""That a student lies on the devices as `trainer` says; what it learns there is test_fsdp.py's."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from branches import PROJECT, branch, metrics
from spreading import FSDP, TORCHRUN

from branchmerge.data.datamodule import prepare
from branchmerge.student.backbone import load_tokenizer
from branchmerge.trajectories.sources import read_branch

SETTINGS = ("domain=math", "data.seq_len=256", "optim.max_steps=1", "optim.global_batch=2", *FSDP)
WAYS = {
    "plain": (),
    "bf16": ("trainer.precision=bf16-mixed",),
    "copies": ("trainer.replicate=2",),
    "offloaded": ("trainer.cpu_offload=true",),
    "kept": ("trainer.activation_checkpointing=false",),
    "overflowing": ("optim.max_steps=2",),
}
Told = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes trained, in all ways, and what they printed."""
    folder = tmp_path_factory.mktemp("told")
    trained(tiny_student, folder, {name: [*SETTINGS, *way] for name, way in WAYS.items()})
    return folder


def trained(student: Path, folder: Path, branches: dict[str, list[str]]) -> list[dict[str, Told]]:
    """Have two processes train; what each tells of each branch. Each prints to a file of its own: lines would mix."""
    logs = ("--log-dir", folder / "logs", "--redirects=1")
    wanted = json.dumps(branches)
    command = [*TORCHRUN, *logs, "tests/distributed/spread_student.py", student, folder / "outputs", wanted]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return told_by_both(folder)


def told_by_both(folder: Path) -> list[dict[str, Told]]:
    both = [json.loads(log.read_text().splitlines()[-1]) for log in sorted((folder / "logs").rglob("stdout.log"))]
    assert len(both) == 2
    return both


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, list[Told]]:
    """What each of the two tells, by the way of spreading."""
    both = told_by_both(folder)
    return {name: [each[name] for each in both] for name in WAYS}


def everywhere(told: list[Told], key: str) -> Any:
    """What both processes say."""
    assert told[0][key] == told[1][key]
    return told[0][key]


@pytest.mark.parametrize("name", WAYS)
def test_each_layer_is_cut_by_itself_and_weights_and_moments_stay_float32(
    name: str, told: dict[str, list[Told]]
) -> None:
    assert everywhere(told[name], "apart") is True
    assert everywhere(told[name], "weights") == everywhere(told[name], "moments") == ["torch.float32"]


def test_a_process_reads_its_share_of_the_weights(told: dict[str, list[Told]]) -> None:
    parts = told["plain"]
    assert [each["numbers read"] for each in parts] == [each["numbers"] for each in parts]
    assert sum(each["numbers"] for each in parts) == everywhere(parts, "all numbers")


def test_copies_are_kept_where_they_are_asked_for(told: dict[str, list[Told]]) -> None:
    assert everywhere(told["plain"], "mesh") == [[2]]
    assert everywhere(told["plain"], "placements") == ["(Shard(dim=0),)"]
    assert everywhere(told["copies"], "mesh") == [[2, 1]]
    assert everywhere(told["copies"], "placements") == ["(Replicate(), Shard(dim=0))"]
    assert everywhere(told["copies"], "numbers") == everywhere(told["copies"], "all numbers")


def test_only_what_is_asked_for_is_done(told: dict[str, list[Told]]) -> None:
    offloaded = {name: everywhere(each, "offloaded") for name, each in told.items()}
    assert offloaded == {name: [name == "offloaded"] for name in WAYS}
    recomputes = {name: everywhere(each, "recomputes") for name, each in told.items()}
    assert recomputes == {name: name != "kept" for name in WAYS}
    assert {everywhere(each, "compiled") for each in told.values()} == {0.0}


def test_a_step_that_breaks_on_one_of_them_is_left_out_by_all(folder: Path, tiny_student: Path) -> None:
    curve = metrics(folder / "outputs" / "overflowing", "math")
    assert [float(row["skipped_rows"]) for row in curve] == [float(curve[0]["rows"]), 0.0]
    assert not math.isfinite(float(curve[0]["loss"])) and math.isfinite(float(curve[1]["loss"]))
    said = "".join(log.read_text() for log in (folder / "logs").rglob("stdout.log"))
    (line,) = [line for line in said.splitlines() if "left out" in line]
    assert "warning: step 0: loss inf" in line
    settings = branch(tiny_student, folder / "none", *SETTINGS, *WAYS["overflowing"])
    corpus = prepare(settings, read_branch(settings), load_tokenizer(tiny_student))
    of_the_second = ", ".join(corpus.documents[number].id for number in corpus.plan.steps[0][1])
    assert f"on the rows {of_the_second};" in line


@pytest.mark.slow
def test_every_layer_is_compiled_where_it_is_asked_for(tiny_student: Path, tmp_path: Path) -> None:
    both = trained(tiny_student, tmp_path, {"compiled": [*SETTINGS, "trainer.compile=true"]})
    assert [each["compiled"]["compiled"] for each in both] == [1.0, 1.0]
