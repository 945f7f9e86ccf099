"""What a name stands for is on the disk before it has that name: a power failure leaves nothing that only looks whole.

No test can cut the power, so the real calls are made and their order is noted.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from branches import branch

from branchmerge.data.datamodule import prepare
from branchmerge.data.prepared import CORPUS, TOKENS, write
from branchmerge.evaluation.requests import Response, Sampling, requests_for
from branchmerge.evaluation.sample_store import SampleStore
from branchmerge.files import write_json
from branchmerge.student.backbone import load_tokenizer
from branchmerge.study import MANIFEST, Manifest, publish
from branchmerge.trajectories.schema import Message
from branchmerge.trajectories.sources import read_branch


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Each flush with the file, each rename with the new name, in order."""
    noted: list[tuple[str, Path]] = []

    def noting(what: str, usual: Callable[..., Any], place: Callable[..., Path]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            noted.append((what, place(*arguments)))
            return usual(*arguments)

        return call

    monkeypatch.setattr(
        os, "fsync", noting("flush", os.fsync, lambda number: Path(f"/proc/self/fd/{number}").readlink())
    )
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noting("rename", getattr(os, name), lambda _, new: Path(new)))
    return noted


def test_a_file_is_flushed_before_it_has_its_name(tmp_path: Path, calls: list[tuple[str, Path]]) -> None:
    write_json(tmp_path / "score.json", {"value": 1})
    assert [what for what, _ in calls] == ["flush", "rename"]
    assert calls[0][1].parent == tmp_path and calls[1][1] == tmp_path / "score.json"


def test_a_response_is_flushed_before_it_counts(tmp_path: Path, calls: list[tuple[str, Path]]) -> None:
    (request,) = requests_for("aime24", [("q1", (Message("user", "1+1?"),))], 1, Sampling(64), seed=42)
    with SampleStore(tmp_path / "a.jsonl", {}) as store:
        store.add([(request, Response("2", 1, "stop"))])
    assert calls == [("flush", tmp_path / "a.jsonl")]


def test_all_files_of_a_result_are_flushed_before_it_has_its_name_and_then_the_name(
    tmp_path: Path, calls: list[tuple[str, Path]]
) -> None:
    with publish(tmp_path / "merged" / "ties", Manifest("merged", "ties", {}, {})) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "figures").mkdir()
        (folder / "figures" / "a.png").write_bytes(b"figure")
    renamed = calls.index(("rename", tmp_path / "merged" / "ties"))
    before = {place.relative_to(folder) for what, place in calls[:renamed] if place.is_relative_to(folder)}
    assert {Path("model.safetensors"), Path("figures/a.png"), Path("figures"), Path(MANIFEST), Path()} <= before
    assert calls[renamed + 1 :] == [("flush", tmp_path / "merged")]


def test_the_tokens_of_a_corpus_are_flushed_before_it_has_its_name(
    tiny_student: Path, tmp_path: Path, calls: list[tuple[str, Path]]
) -> None:
    config = branch(tiny_student, tmp_path, "domain=math")
    corpus = prepare(config, read_branch(config), load_tokenizer(tiny_student))
    calls.clear()
    write(corpus, tmp_path / "corpus")
    flushed = [place.name for what, place in calls[: calls.index(("rename", tmp_path / "corpus"))] if what == "flush"]
    assert flushed[0] == TOKENS and any(CORPUS in name for name in flushed[1:])
