import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from branches import branch

from branchmerge.config import SourceConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.graders import grade
from branchmerge.trajectories.schema import Reference, Trajectory
from branchmerge.trajectories.sources import SPLIT_RULE, described, identity, is_held_out, is_local, read, unpinned

GSM8K = {
    "question": "Ann packs 3 boxes of 400 pens and sells none. How many pens?",
    "answer": "Each box has 400, so 3*400=<<3*400=1200>>1200 pens.\n#### 1,200",
}
MBPP = {
    "text": " Write a function to add one. ",
    "code": "def inc(x):\r\n    return x + one",
    "test_list": ["assert inc(1) == 2", "assert inc(-1) == 0"],
    "test_setup_code": "one = 1",
}
MMLU = {"question": "What is the unit of force?\n", "choices": ["joule", "watt", "newton", "pascal"], "answer": 2}
FORMAT_ROWS = [("gsm8k", GSM8K), ("mbpp", MBPP), ("mmlu", MMLU)]


def message_row(question: str, answer: str = "\\boxed{1}") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def jsonl(folder: Path, *rows: Any) -> Path:
    """A file of these rows; a text stands as it is."""
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def convert(folder: Path, fmt: str, row: Any) -> Trajectory:
    (trajectory,) = read(SourceConfig(path=str(jsonl(folder, row)), format=fmt))
    return trajectory


def test_rows_are_read_in_file_order_with_the_line_as_default_id(tmp_path: Path) -> None:
    named = ({**message_row("b"), "id": "mine"}, {**message_row("c"), "id": 0}, {**message_row("d"), "id": ""})
    path = jsonl(tmp_path, message_row("a"), "", *named)
    rows = read(SourceConfig(path=str(path)))
    assert [row.id for row in rows] == ["rows-00001", "mine", "0", "rows-00005"]
    assert [row.question for row in rows] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"messages": [', "not JSON"),
        ("plain text", "not JSON"),
        ("[1, 2]", "not a row of format messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant turn"),
        ({"messages": [*message_row("x")["messages"], {"role": "user", "content": "y"}]}, "last message must be"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "needs a role"),
        ({**message_row("x"), "reference": {"answer": "1"}}, "needs a grader"),
        ({**message_row("x"), "reference": {"grader": "code"}}, "list of tests"),
        ({**message_row("x"), "reference": {"grader": "math"}}, "needs an answer"),
        ({**message_row("x"), "reference": {"grader": "math", "answer": None}}, "needs an answer"),
        ({**message_row("x"), "reference": {"grader": "integer", "answer": "1" * 1001}}, "at most 1000 digits"),
        ({**message_row("x"), "id": "\ud83d"}, "its id or domain holds half a character"),
    ],
)
def test_unusable_row_is_named_by_file_and_line(tmp_path: Path, bad: Any, says: str) -> None:
    path = jsonl(tmp_path, message_row("a"), "", bad)
    with pytest.raises(UserError) as raised:
        read(SourceConfig(path=str(path)))
    assert str(raised.value).startswith(f"{path}:3: ")
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("fmt", "row", "says"),
    [
        ("gsm8k", {"question": "x"}, "no field 'answer'"),
        ("mbpp", {key: MBPP[key] for key in ("text", "code")}, "no field 'test_list'"),
        ("mbpp", {**MBPP, "test_list": [], "test_setup_code": ""}, "list of tests"),
        ("mmlu", {**MMLU, "answer": 10}, "format mmlu"),
        ("mmlu", {**MMLU, "answer": "C"}, "format mmlu"),
        ("mmlu", {**MMLU, "answer": float("inf")}, "format mmlu"),
        ("mmlu", [1], "format mmlu"),
    ],
)
def test_row_of_another_format_is_named_by_file_and_line(tmp_path: Path, fmt: str, row: Any, says: str) -> None:
    path = jsonl(tmp_path, row)
    with pytest.raises(UserError, match=says) as raised:
        read(SourceConfig(path=str(path), format=fmt))
    assert str(raised.value).startswith(f"{path}:1: ")


def test_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format=parquet: choose one of messages, gsm8k, mbpp, mmlu"):
        read(SourceConfig(path=str(jsonl(tmp_path, message_row("a"))), format="parquet"))


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="no rows"):
        read(SourceConfig(path=str(path)))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(SourceConfig(path=str(tmp_path / "none.jsonl")))


def test_limit_reads_the_first_rows_and_nothing_after_them(tmp_path: Path) -> None:
    path = jsonl(tmp_path, message_row("a"), message_row("b"), "broken")
    assert [row.question for row in read(SourceConfig(path=str(path), limit=2))] == ["a", "b"]


def test_gsm8k_row(tmp_path: Path) -> None:
    row = convert(tmp_path, "gsm8k", GSM8K)
    assert row.question == GSM8K["question"]
    assert row.response == "<think>\nEach box has 400, so 3*400=1200 pens.\n</think>\n\n\\boxed{1200}"
    assert (row.domain, row.reference) == ("math", Reference("math", answer="1200"))


def test_mbpp_row(tmp_path: Path) -> None:
    row = convert(tmp_path, "mbpp", MBPP)
    assert row.question == (
        "Write a function to add one.\nYour code should pass these tests:\nassert inc(1) == 2\nassert inc(-1) == 0"
    )
    assert row.response == "```python\ndef inc(x):\n    return x + one\n```"
    assert row.domain == "code"
    assert row.reference == Reference("code", tests=("one = 1", "assert inc(1) == 2", "assert inc(-1) == 0"))


def test_mmlu_row(tmp_path: Path) -> None:
    row = convert(tmp_path, "mmlu", MMLU)
    assert row.question == (
        "What is the unit of force?\nA. joule\nB. watt\nC. newton\nD. pascal\nAnswer with the letter."
    )
    assert (row.response, row.domain) == ("\\boxed{C}", "science")
    assert row.reference == Reference("choice", answer="C")


@pytest.mark.parametrize(("fmt", "raw"), FORMAT_ROWS)
def test_converted_response_is_correct_by_its_own_reference(tmp_path: Path, fmt: str, raw: Any) -> None:
    row = convert(tmp_path, fmt, raw)
    assert row.reference is not None
    assert grade(row.response, row.reference).correct


@pytest.mark.parametrize(
    ("fmt", "wrong"),
    [
        ("gsm8k", "\\boxed{1201}"),
        ("mbpp", "```python\ndef inc(x):\n    return x\n```"),
        ("mmlu", "\\boxed{B}"),
    ],
)
def test_another_response_is_wrong_by_the_converted_reference(tmp_path: Path, fmt: str, wrong: str) -> None:
    reference = convert(tmp_path, fmt, dict(FORMAT_ROWS)[fmt]).reference
    assert reference is not None
    assert not grade(wrong, reference).correct


def test_train_and_test_share_the_questions_without_overlap(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *(message_row(f"question {number}") for number in range(400)))
    parts = {
        split: [row.question for row in read(SourceConfig(path=str(path), split=split))]
        for split in ("all", "train", "test")
    }
    assert sorted(parts["train"] + parts["test"]) == sorted(parts["all"])
    assert not set(parts["train"]) & set(parts["test"])
    assert 50 < len(parts["test"]) < 110  # one in five of 400: 80, and four standard deviations are 32


def test_split_depends_on_the_question_alone(tmp_path: Path) -> None:
    questions = [f"question {number}" for number in range(40)]
    rows = [{**message_row(question, "another answer"), "id": "x"} for question in reversed(questions)]
    test = read(SourceConfig(path=str(jsonl(tmp_path, *rows)), split="test"))
    assert {row.question for row in test} == {question for question in questions if is_held_out(question)}


@pytest.mark.parametrize(
    ("fmt", "row", "field", "changes"),
    [
        ("mmlu", MMLU, "question", {"choices": ["4", "3", "2", "1"]}),
        ("mbpp", MBPP, "text", {"test_list": ["assert inc(2) == 3"]}),
    ],
)
def test_the_same_question_with_other_choices_or_tests_stays_in_one_part(
    fmt: str, row: dict[str, Any], field: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    asked = [{**row, field: f"question {number}?"} for number in range(40)]
    again = [{**one, **changes, field: f" {one[field]}\n"} for one in asked]
    path = str(jsonl(tmp_path, *asked, *again))
    for split in ("train", "test"):
        rows = read(SourceConfig(path=path, format=fmt, split=split))
        stems = [row.question.strip().splitlines()[0] for row in rows]
        assert stems and stems[: len(stems) // 2] == stems[len(stems) // 2 :]


def test_limit_counts_rows_of_the_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *(message_row(f"question {number}") for number in range(60)))
    whole = read(SourceConfig(path=str(path), split="test"))
    assert len(whole) > 3
    assert read(SourceConfig(path=str(path), split="test", limit=3)) == whole[:3]


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("project:assets/rows.jsonl", True),
        ("/data/rows", True),
        ("./rows", True),
        ("~/rows", True),
        ("data/rows.jsonl", True),
        ("a/b/c", True),
        ("openai/gsm8k", False),
        ("cais/mmlu", False),
    ],
)
def test_what_counts_as_a_file(path: str, local: bool) -> None:
    assert is_local(SourceConfig(path=path)) is local


def test_a_folder_here_is_no_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `datasets` would read, and whose rows could change without a word."""
    (tmp_path / "my" / "rows").mkdir(parents=True)
    jsonl(tmp_path / "my" / "rows", message_row("a"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="my/rows: is a folder; give a JSONL file"):
        read(SourceConfig(path="my/rows"))


def test_half_a_character_is_named_where_rows_are_dealt_out_by_their_question(tmp_path: Path) -> None:
    path = jsonl(tmp_path, message_row("a"), message_row("\ud83d"))
    with pytest.raises(UserError, match=r"rows.jsonl:2: .* half a character"):
        read(SourceConfig(path=str(path), split="train"))


def test_identity_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    path = jsonl(tmp_path, message_row("a"))
    assert identity(SourceConfig(path=str(path))) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_parts_of_a_file_are_known_by_the_rule_that_made_them(tmp_path: Path) -> None:
    """Else an expert of another rule, which has seen today's test questions, would count as made already."""
    path = str(jsonl(tmp_path, message_row("one")))
    whole, part = (described(SourceConfig(path=path, split=split)) for split in ("all", "train"))
    assert "split_rule" not in whole and part == {**whole, "split": "train", "split_rule": SPLIT_RULE}
    assert "split_rule" not in described(SourceConfig(path="openai/gsm8k", split="train"))


def test_identity_of_a_hub_dataset_is_its_revision() -> None:
    assert identity(SourceConfig(path="openai/gsm8k", revision="e53f048")) == "openai/gsm8k@e53f048"


def test_hub_datasets_without_a_revision_are_known(tiny_student: Path, tmp_path: Path) -> None:
    of_the_hub = ("domain=mixture", "study.corpus.math.path=owner/rows", "study.corpus.code.path=owner/rows")
    config = branch(tiny_student, tmp_path, *of_the_hub, "study.corpus.code.revision=0123abc")
    assert unpinned(config) == ["math"]
