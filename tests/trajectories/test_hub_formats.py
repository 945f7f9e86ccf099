"""Rows as hub data sets publish them become trajectories."""

import json
from pathlib import Path

import pytest

from branchmerge.config import SourceConfig
from branchmerge.errors import UserError
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
S1 = {
    "question": "What is 1 + 1?",
    "deepseek_thinking_trajectory": "One more.\n",
    "deepseek_attempt": "2",
    "solution": "2",
}


@pytest.mark.parametrize(("form", "raw"), [("openthoughts", OPENTHOUGHTS), ("s1", S1)])
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
