"""Rows as hub data sets publish them become trajectories."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from branchmerge.config import SourceConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.prompts import BOXED
from branchmerge.trajectories import sources

OPENTHOUGHTS = {
    "system": "Your role as an assistant involves thorough exploration.",
    "conversations": [
        {"from": "user", "value": "What is 1 + 1?"},
        {
            "from": "assistant",
            "value": "<|begin_of_thought|>\n\nOne more.\n\n<|end_of_thought|>\n\n"
            "<|begin_of_solution|>\n\n2\n\n<|end_of_solution|>",
        },
    ],
}
METADATA = {
    "problem": "What is 1 + 1?\n",
    "deepseek_reasoning": "One more.\n",
    "deepseek_solution": "\n2",
    "domain": "physics",
    "test_cases": None,
    "starter_code": None,
}
S1 = {
    "question": "What is 1 + 1?",
    "deepseek_thinking_trajectory": "One more.\n",
    "deepseek_attempt": "2",
    "solution": "2",
}


@pytest.mark.parametrize(("form", "raw"), [("openthoughts", OPENTHOUGHTS), ("openthoughts", METADATA), ("s1", S1)])
def test_a_row_becomes_a_trajectory(form: str, raw: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(raw) + "\n")
    (row,) = sources.read(SourceConfig(path=str(file), format=form))
    assert row.question == "What is 1 + 1?"
    assert row.response == "<think>\nOne more.\n</think>\n\n2"
    assert row.reference is None


def test_a_conversation_of_several_turns_is_refused(tmp_path: Path) -> None:
    """Of which only the last two would be left."""
    file = tmp_path / "rows.jsonl"
    turns = [*OPENTHOUGHTS["conversations"], *OPENTHOUGHTS["conversations"]]  # type: ignore[misc]
    file.write_text(json.dumps({"conversations": turns}) + "\n")
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* it has 4 turns"):
        sources.read(SourceConfig(path=str(file), format="openthoughts"))


def test_a_row_without_marks_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    turns = [{"from": "user", "value": "What?"}, {"from": "assistant", "value": "2"}]
    file.write_text(json.dumps({"conversations": turns}) + "\n")
    with pytest.raises(UserError, match="end_of_thought"):
        sources.read(SourceConfig(path=str(file), format="openthoughts"))


@pytest.mark.parametrize(
    ("facts", "asked"),
    [
        (
            {"domain": "code", "test_cases": '{"inputs": ["1"], "outputs": ["2"]}', "starter_code": ""},
            "Write a Python program that solves this problem: it reads from standard input and prints the answer.\n\n"
            "What is 1 + 1?",
        ),
        (
            {"domain": "code", "test_cases": '{"fn_name": "add", "inputs": []}', "starter_code": "def add(a):\n    "},
            "Write a Python function that solves this problem; do not call it.\n\nWhat is 1 + 1?\ndef add(a):\n    ",
        ),
        (
            {"domain": "math"},
            "What is 1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}.",
        ),
    ],
)
def test_openthoughts_metadata_asks_for_the_form_of_the_answer(
    facts: dict[str, str], asked: str, tmp_path: Path
) -> None:
    """How a program is run stands in its tests, and not in the problem."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**METADATA, **facts}) + "\n")
    (row,) = sources.read(SourceConfig(path=str(file), format="openthoughts"))
    assert row.question == asked


def test_some_domains_of_a_data_set(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    domains = ("math", "physics", "code", "biology", "code")
    rows = [{**METADATA, "problem": f"{number}?", "domain": domain} for number, domain in enumerate(domains)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(file), format="openthoughts", where={"domain": ["physics", "biology"]}, limit=2)
    assert [(row.id, row.question) for row in sources.read(source)] == [("rows-00002", "1?"), ("rows-00004", "3?")]
    both = replace(source, where={"domain": ["physics", "math"], "problem": ["0?"]})
    assert [row.question for row in sources.read(both)] == ["0?\n" + BOXED]
    nothing = replace(source, where={"domain": ["Code"]})
    with pytest.raises(UserError, match=r"no rows; none is where=.*'Code'.*, but domain=math, domain=physics, domain="):
        sources.read(nothing)
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* no field 'topic'"):
        sources.read(replace(source, where={"topic": ["x"]}))
    plain = replace(source, where={})
    assert sources.described(source) != sources.described(plain) and "where" not in sources.described(plain)
