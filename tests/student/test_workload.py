"""What a branch trains on: counted anew whenever that may have changed, and never more than the limits leave."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from branchmerge import config
from branchmerge.config_checks import typed
from branchmerge.errors import UserError
from branchmerge.student import workload as module
from branchmerge.student.workload import Workload, workload

PROJECT = Path(__file__).resolve().parents[2]
config.register()


def asked(*overrides: str) -> config.TrainConfig:
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return typed(compose("train", overrides=["plan=true", *overrides]), config.TrainConfig)


def expected(*overrides: str) -> Workload:
    found = workload(asked("study=tinyr1_1_5b", "optim.epochs=2", *overrides), None, Path())
    assert found is not None
    return found


def counted(student: Path, folder: Path, *overrides: str) -> Workload:
    few = ["data.limit=20", "data.seq_len=512", "data.verify=false", "trainer.progress=false"]
    found = workload(asked(f"backbone.path={student}", *few, *overrides), student, folder)
    assert found is not None
    return found


def test_no_more_is_expected_than_is_read() -> None:
    assert expected().rows == 2 * 46_867  # 93,733 trajectories of half a row each, twice
    assert expected("domain=science").rows == 2 * 2_950  # 1,000 of one source and 4,900 of the other
    assert expected("domain=mixture").rows == 2 * 59_817
    assert expected("data.limit=100").rows == 2 * 50
    assert expected("study.corpus.math={path: some/set, limit: 60}", "data.limit=100").rows == 2 * 30
    assert "60 of math" in expected("study.corpus.math={path: some/set, limit: 60}").said
    few = expected("data.packed_rows=3", "optim.global_batch=2")
    assert (few.rows, few.steps, few.tokens) == (6, 3, 6 * 16384)


def test_a_trajectory_takes_a_packed_row_at_most() -> None:
    """What is longer is left out or cut before it is packed."""
    found = expected("study.expected.math.tokens=100000")
    assert (found.rows, found.tokens) == (2 * 93_733, 2 * 93_733 * 16384)
    assert found.documents == [(16384, pytest.approx(2 * 93_733))]


def test_other_versions_count_anew(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = counted(tiny_student, tmp_path)
    assert counted(tiny_student, tmp_path) == first and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(module, "package_versions", lambda: {"transformers": "99"})
    assert counted(tiny_student, tmp_path) == first and len(list(tmp_path.iterdir())) == 2


def test_rows_held_out_of_another_domain_count(tiny_student: Path, tmp_path: Path) -> None:
    """They are not trained on here either, where a prompt is the same."""
    lines = [
        (PROJECT / f"assets/demo/trajectories/{part}.jsonl").read_text().splitlines() for part in ("math", "science")
    ]
    others = tmp_path / "others.jsonl"
    given = ["data.validation_rows=3", f"study.corpus.science.path={others}"]
    others.write_text("\n".join(lines[1][:10]))
    before = counted(tiny_student, tmp_path / "plans", *given)
    others.write_text("\n".join(lines[0][:6]))
    after = counted(tiny_student, tmp_path / "plans", *given)
    assert after.tokens < before.tokens


def test_what_is_held_out_is_not_downloaded_to_be_counted(tiny_student: Path, tmp_path: Path) -> None:
    given = ["data.limit=20", "data.validation_rows=3", "study.corpus.science.path=some/set"]
    assert workload(asked(f"backbone.path={tiny_student}", *given), tiny_student, tmp_path) is None


def test_a_tokenizer_that_cannot_train_is_named(tiny_student: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for file in tiny_student.iterdir():
        if file.name != "chat_template.jinja":
            (student / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        counted(student, tmp_path)
