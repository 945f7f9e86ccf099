from typing import Any

import pytest

from branchmerge.trajectories.schema import Message, Reference, Trajectory

USER = {"role": "user", "content": "What is 12 x 7?"}
ASSISTANT = {"role": "assistant", "content": "\\boxed{84}"}


def row(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def test_full_row_is_parsed() -> None:
    system = {"role": "system", "content": "Be brief."}
    reference = {"grader": "math", "answer": 84}
    parsed = Trajectory.parse(row(system, USER, ASSISTANT, id="m-1", domain="math", reference=reference), "x")
    turns = (Message("system", "Be brief."), Message("user", "What is 12 x 7?"), Message("assistant", "\\boxed{84}"))
    assert parsed == Trajectory("m-1", "math", turns, Reference("math", answer="84"))


def test_only_messages_are_required() -> None:
    parsed = Trajectory.parse(row(USER, ASSISTANT), "file-00003")
    assert (parsed.id, parsed.domain, parsed.reference) == ("file-00003", "", None)


def test_null_reference_is_no_reference() -> None:
    assert Trajectory.parse(row(USER, ASSISTANT, reference=None), "x").reference is None


def test_only_the_last_turn_is_the_response() -> None:
    second = {"role": "user", "content": "And 12 x 8?"}
    answer = {"role": "assistant", "content": "\\boxed{96}"}
    parsed = Trajectory.parse(row(USER, ASSISTANT, second, answer), "x")
    assert parsed.response == "\\boxed{96}"
    assert parsed.question == "And 12 x 8?"
    assert [message.as_dict() for message in parsed.prompt] == [USER, ASSISTANT, second]


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("text", "list of messages"),
        ([USER, ASSISTANT], "list of messages"),
        ({"prompt": "x"}, "list of messages"),
        (row(), "no assistant turn"),
        (row(USER), "no assistant turn"),
        (row(USER, ASSISTANT, USER), "last message must be the assistant's; it is the user's"),
        (row(ASSISTANT), "no user turn"),
        (row(USER, {"role": "tool", "content": "x"}, ASSISTANT), "message 1 needs a role, one of system, user"),
        (row({"content": "x"}, ASSISTANT), "message 0 needs a role"),
        (row("hello", ASSISTANT), "message 0 needs a role"),
        (row(USER, {"role": "assistant"}), r"message 1 \(assistant\) needs a text"),
        (row(USER, {"role": "assistant", "content": None}), "needs a text"),
        (row({"role": "user", "content": [{"type": "text", "text": "x"}]}, ASSISTANT), "needs a text"),
        (row({"role": "user", "content": "\ud83d"}, ASSISTANT), r"message 0 \(user\) holds half a character"),
        (row(USER, {**ASSISTANT, "reasoning_content": "84."}), r"message 1 \(assistant\) has reasoning_content, which"),
        (row(USER, {**ASSISTANT, "tool_calls": [{}]}), "has tool_calls, which nothing reads"),
    ],
)
def test_unusable_row_is_refused_with_its_reason(raw: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Trajectory.parse(raw, "x")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("84", "needs a grader"),
        ({}, "needs a grader"),
        ({"answer": "84"}, "needs a grader, one of math, choice, integer, code, livecodebench"),
        ({"grader": "essay", "answer": "84"}, "needs a grader.*essay"),
        ({"grader": "math"}, "'math' needs an answer"),
        ({"grader": "choice"}, "'choice' needs an answer"),
        ({"grader": "integer"}, "'integer' needs an answer"),
        ({"grader": "integer", "answer": "12.5"}, "needs an integer of at most 1000 digits; its answer is '12.5'"),
        ({"grader": "livecodebench", "function": "f"}, "public or private tests"),
        ({"grader": "math", "tests": ["assert True"]}, "'math' needs an answer"),
        ({"grader": "code", "answer": "84"}, "non-empty list of tests"),
        ({"grader": "code", "tests": []}, "non-empty list of tests"),
        ({"grader": "code", "tests": "assert True"}, "non-empty list of tests"),
        ({"grader": "code", "tests": ["assert f()", {"input": "1"}]}, r"tests that can fail.* cannot: \{'input'"),
        ({"grader": "code", "tests": ['{"input": "1", "output": "2"}']}, "this one cannot: .*input"),
        ({"grader": "code", "tests": ["f(1) == 2"]}, r"this one cannot: 'f\(1\) == 2'"),
        ({"grader": "code", "tests": [None]}, "this one cannot: None"),
        ({"grader": "code", "tests": [["assert f() == 1"]]}, "this one cannot"),
        ({"grader": "code", "tests": [" \n# nothing"]}, "this one cannot"),
        ({"grader": "math", "answer": " "}, "needs an answer, a text or a number; it is ' '"),
        ({"grader": "math", "answer": ["84"]}, r"needs an answer, a text or a number; it is \['84'\]"),
        ({"grader": "math", "answer": True}, "needs an answer, a text or a number"),
        ({"grader": "math", "answer": float("nan")}, "needs an answer, a text or a number"),
        ({"grader": "choice", "answer": 1}, "needs a letter from A to J; its answer is '1'"),
        ({"grader": "choice", "answer": "b"}, "needs a letter"),
        ({"grader": "choice", "answer": "(B)"}, "needs a letter"),
        ({"grader": "choice", "answer": "BC"}, "needs a letter"),
    ],
)
def test_unusable_reference_is_refused_with_its_reason(reference: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Trajectory.parse(row(USER, ASSISTANT, reference=reference), "x")


def test_fields_of_a_turn_that_say_nothing_do_no_harm() -> None:
    said = {**ASSISTANT, "reasoning_content": None, "tool_calls": [], "name": "teacher"}
    assert Trajectory.parse(row(USER, said), "x").response == ASSISTANT["content"]


def test_code_reference_keeps_its_tests_in_order() -> None:
    tests = ["one = 1", "import math", "assert f(1) == 2", "check(f)", "if f(1) != 2:\n    raise ValueError", "f(1) =="]
    assert Reference.parse({"grader": "code", "tests": tests}) == Reference("code", tests=tuple(tests))
