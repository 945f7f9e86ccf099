"""A branch's documents on disk: the same when read again, prepared once, whole or not there."""

import json
import resource
from pathlib import Path

import psutil
import pytest
from branches import branch

from branchmerge.config import TrainConfig
from branchmerge.data.datamodule import Corpus, data_account, prepare
from branchmerge.data.prepared import CORPUS, TOKENS, prepared, read, write
from branchmerge.errors import UserError
from branchmerge.evaluation.graders import grade
from branchmerge.machine import give_back_memory
from branchmerge.student.backbone import load_tokenizer
from branchmerge.trajectories.schema import Reference
from branchmerge.trajectories.sources import read_branch


@pytest.fixture
def config(tiny_student: Path, tmp_path: Path) -> TrainConfig:
    return branch(tiny_student, tmp_path, "domain=math", "data.validation_rows=2", "optim.epochs=2")


@pytest.fixture
def corpus(config: TrainConfig, tiny_student: Path) -> Corpus:
    return prepare(config, read_branch(config), load_tokenizer(tiny_student))


def said(corpus: Corpus) -> tuple[object, ...]:
    """All that there is in it."""
    parts = {"": corpus.documents, **corpus.held_out}
    listed = {part: [(d.id, d.tokens.tolist(), d.prompt_len) for d in documents] for part, documents in parts.items()}
    return list(parts), listed, corpus.plan, corpus.account


def test_what_is_read_is_what_was_written(config: TrainConfig, corpus: Corpus, tmp_path: Path) -> None:
    assert len(corpus.held_out) == 3 and len(corpus.documents) > 10
    write(corpus, tmp_path / "corpus")
    found = read(config, tmp_path / "corpus")
    assert said(found) == said(corpus) and found.fingerprint


def test_the_same_documents_in_other_rows_have_another_fingerprint(
    config: TrainConfig, corpus: Corpus, tmp_path: Path
) -> None:
    write(corpus, tmp_path / "corpus")
    fingerprint = read(config, tmp_path / "corpus").fingerprint
    assert read(config, tmp_path / "corpus").fingerprint == fingerprint
    config.data.seq_len //= 2
    assert read(config, tmp_path / "corpus").fingerprint != fingerprint


def test_a_token_takes_four_bytes_which_are_mapped(config: TrainConfig, corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write(corpus, folder)
    kept = [*corpus.documents, *(one for part in corpus.held_out.values() for one in part)]
    assert (folder / TOKENS).stat().st_size == 4 * sum(map(len, kept))
    assert str(folder / TOKENS) not in Path("/proc/self/maps").read_text()
    documents = read(config, folder).documents
    assert str(folder / TOKENS) in Path("/proc/self/maps").read_text()
    assert not any(document.tokens.flags.owndata for document in documents)


def math_workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "math_worker" in " ".join(child.cmdline())]


def test_rows_are_asked_for_once(tiny_student: Path, tmp_path: Path) -> None:
    """And whom they are asked of is gone then: a worker of math-verify holds 50 MB."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "What is 6 x 7?"}, {"role": "assistant", "content": "\\boxed{42}"}]
    rows.write_text(json.dumps({"messages": turns, "reference": {"grader": "math", "answer": "\\frac{84}{2}"}}) + "\n")
    config = branch(tiny_student, tmp_path, "domain=math", f"data.path={rows}", "optim.global_batch=1")
    verdict = grade("\\boxed{42}", Reference("math", answer="\\frac{84}{2}"))
    assert verdict.correct and math_workers()
    account = data_account(config)
    first = prepared(config, tiny_student, tmp_path / "corpus", begun=False, account=account)
    assert len(first.documents) == 1 and not math_workers()
    rows.unlink()
    assert said(prepared(config, tiny_student, tmp_path / "corpus", begun=False, account=account)) == said(first)


def test_a_file_that_is_still_written_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    """Before its rows are graded: the result would be known by the rows that it had at first."""
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "What is 6 x 7?"}, {"role": "assistant", "content": "42"}]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    config = branch(tiny_student, tmp_path, "domain=math", f"data.path={rows}")
    account = data_account(config)
    with rows.open("a") as more:
        more.write(json.dumps({"messages": turns, "id": "one more"}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl: has changed since this run began"):
        prepared(config, tiny_student, tmp_path / "corpus", begun=False, account=account)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    "harm", ["a token", "half the tokens", "no account", "a broken account", "another prompt", "another format"]
)
def test_what_is_not_whole_is_made_again(
    harm: str, config: TrainConfig, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    first = said(prepared(config, tiny_student, folder, begun=False, account=data_account(config)))
    tokens = (folder / TOKENS).read_bytes()
    if harm == "a token":
        (folder / TOKENS).write_bytes(bytes([tokens[0] ^ 1]) + tokens[1:])
    elif harm == "half the tokens":
        (folder / TOKENS).write_bytes(tokens[: len(tokens) // 2])
    elif harm == "another format":
        (folder / CORPUS).write_text((folder / CORPUS).read_text().replace('"format": 1', '"format": 0'))
    elif harm == "another prompt":
        facts = json.loads((folder / CORPUS).read_text())
        facts["documents"][0][2] -= 1
        (folder / CORPUS).write_text(json.dumps(facts))
    elif harm == "no account":
        (folder / CORPUS).unlink()
    else:
        (folder / CORPUS).write_text("{")
    assert said(prepared(config, tiny_student, folder, begun=False, account=data_account(config))) == first
    assert f"{folder}: not whole" in capsys.readouterr().out


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "math-verify", "sympy", "graders"])
@pytest.mark.parametrize("begun", [False, True])
def test_other_versions_prepare_anew_unless_there_are_checkpoints(
    begun: bool,
    package: str,
    config: TrainConfig,
    tiny_student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "corpus"
    prepared(config, tiny_student, folder, begun=False, account=data_account(config))
    facts = json.loads((folder / CORPUS).read_text())
    facts["packages"][package] = "0.5"
    (folder / CORPUS).write_text(json.dumps(facts))
    capsys.readouterr()
    prepared(config, tiny_student, folder, begun, data_account(config))
    assert ("rows as an earlier run prepared them" in capsys.readouterr().out) is begun
    now = json.loads((folder / CORPUS).read_text())["packages"][package]
    assert (now == "0.5") is begun


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(corpus: Corpus, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write corpus there .*make room"):
            write(corpus, tmp_path / "corpus")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*corpus*"))


def test_what_was_prepared_does_not_stay_in_memory(tiny_student: Path, tmp_path: Path) -> None:
    """Texts and tokens of a study have gigabytes, and the process that read them trains for days."""
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(4000):  # all but one without a response, which are dropped before they take time
            asked, said = ("6 x 7?", "42") if number == 0 else (str(number) * 2500, " ")
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = branch(tiny_student, tmp_path, "domain=math", f"data.path={rows}", "optim.global_batch=1")
    account = data_account(config)
    give_back_memory()
    before = psutil.Process().memory_info().rss
    found = prepared(config, tiny_student, tmp_path / "corpus", begun=False, account=account)
    assert len(found.documents) == 1 and found.account["sources"]["data.path"]["dropped"] == {"empty": 3999}
    assert psutil.Process().memory_info().rss - before < rows.stat().st_size / 4
