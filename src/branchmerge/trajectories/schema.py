"""A trajectory: a question, the teacher's reasoning and answer, and what a correct answer is.

As a JSONL row (the format `messages`):

    {"id": "math-00012", "domain": "math",
     "messages": [{"role": "user", "content": "What is 12 x 7?"},
                  {"role": "assistant", "content": "<think>\\n...\\n</think>\\n\\n\\\\boxed{84}"}],
     "reference": {"grader": "math", "answer": "84"}}

Only `messages` is required; it ends with an assistant turn, which is what the student learns. A reference names its
grader: `math`, `choice` and `integer` carry an `answer`, `code` carries `tests`, a list of Python statements that must
all pass, and `livecodebench` the packed tests of a problem, `public` and `private`, and the `function` they call.
"""

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

ROLES = ("system", "user", "assistant")
MOST_DIGITS = 1000
"""Most digits of an integer answer; Python parses none of more than 4,300."""
CHOICES = "ABCDEFGHIJ"
"""Letters of choices"""
LOST = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""Other fields of a turn in which programs put text; only the content is learned"""
IDLE = (ast.Compare, ast.BoolOp, ast.Constant, ast.Name, ast.Dict, ast.List, ast.Tuple, ast.Set)
"""Expressions that test nothing when used as a statement"""
GRADERS = ("math", "choice", "integer", "code", "livecodebench", "livecodebench_official")


@dataclass(frozen=True)
class Message:
    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Reference:
    """What a correct answer is, and which grader decides."""

    grader: str
    answer: str = ""
    tests: tuple[str, ...] = ()
    public: str = ""
    """LiveCodeBench's public_test_cases as published; see `evaluation.livecodebench`."""
    private: str = ""
    """LiveCodeBench's private_test_cases as published."""
    function: str = ""
    """What LiveCodeBench's tests call; empty for a program that reads stdin."""

    @staticmethod
    def parse(raw: Any) -> "Reference":
        """Check a row's reference; raises ValueError that says what is wrong."""
        if not isinstance(raw, Mapping) or raw.get("grader") not in GRADERS:
            raise ValueError(f"reference needs a grader, one of {', '.join(GRADERS)}; it is {raw!r}")
        if raw["grader"] == "code":
            tests = raw.get("tests")
            if not isinstance(tests, Sequence) or isinstance(tests, str) or not tests:
                raise ValueError("a reference with grader 'code' needs a non-empty list of tests")
            for test in tests:
                if _cannot_fail(test):
                    raise ValueError(
                        "a reference with grader 'code' needs tests that can fail, such as 'assert f(1) == 2'; this one"
                        f" cannot: {repr(test)[:100]}"
                    )
            return Reference("code", tests=tuple(tests))
        if raw["grader"] in ("livecodebench", "livecodebench_official"):
            public, private = str(raw.get("public") or ""), str(raw.get("private") or "")
            if not public and not private:
                raise ValueError(f"a reference with grader {raw['grader']!r} needs its public or private tests")
            return Reference(raw["grader"], public=public, private=private, function=str(raw.get("function") or ""))
        answer = raw.get("answer")
        if not _is_answer(answer):
            raise ValueError(
                f"a reference with grader {raw['grader']!r} needs an answer, a text or a number; it is"
                f" {repr(answer)[:100]}"
            )
        if raw["grader"] == "choice" and (len(str(answer)) != 1 or str(answer) not in CHOICES):
            raise ValueError(
                f"a reference with grader 'choice' needs a letter from {CHOICES[0]} to {CHOICES[-1]}; its answer is"
                f" {str(answer)[:100]!r}"
            )
        if raw["grader"] == "integer" and not re.fullmatch(rf"[+-]?\d{{1,{MOST_DIGITS}}}", str(raw["answer"])):
            raise ValueError(
                f"a reference with grader 'integer' needs an integer of at most {MOST_DIGITS} digits; its answer is"
                f" {str(raw['answer'])[:100]!r}"
            )
        return Reference(raw["grader"], answer=str(raw["answer"]))


@dataclass(frozen=True)
class Trajectory:
    """One checked row; the last message is the assistant's."""

    id: str
    domain: str
    messages: tuple[Message, ...]
    reference: Reference | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the turn that is learned."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The assistant turn that is learned: reasoning and answer."""
        return self.messages[-1].content

    @property
    def question(self) -> str:
        """The last user turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @staticmethod
    def parse(raw: Any, default_id: str) -> "Trajectory":
        """Check a `messages` row; raises ValueError that says what is wrong."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("messages"), Sequence):
            raise ValueError("a row is an object with a list of messages")
        messages = []
        for number, turn in enumerate(raw["messages"]):
            if not isinstance(turn, Mapping) or turn.get("role") not in ROLES:
                raise ValueError(f"message {number} needs a role, one of {', '.join(ROLES)}")
            if not isinstance(turn.get("content"), str):
                raise ValueError(f"message {number} ({turn['role']}) needs a text as content")
            apart = next((name for name in LOST if turn.get(name)), None)
            if apart is not None:
                raise ValueError(
                    f"message {number} ({turn['role']}) has {apart}, which nothing reads; put it into the content,"
                    " reasoning between <think> and </think> before the answer"
                )
            if not _is_text(turn["content"]):
                raise ValueError(f"message {number} ({turn['role']}) holds half a character (a lone surrogate)")
            messages.append(Message(turn["role"], turn["content"]))
        if not any(message.role == "assistant" for message in messages):
            raise ValueError("the row has no assistant turn, so there is nothing to learn from it")
        if messages[-1].role != "assistant":
            raise ValueError(f"the last message must be the assistant's; it is the {messages[-1].role}'s")
        if not any(message.role == "user" for message in messages[:-1]):
            raise ValueError("the row has no user turn before the assistant's")
        reference = Reference.parse(raw["reference"]) if raw.get("reference") is not None else None
        given = raw.get("id")
        row_id, domain = default_id if given in (None, "") else str(given), str(raw.get("domain") or "")
        if not _is_text(row_id + domain):
            raise ValueError("its id or domain holds half a character (a lone surrogate)")
        return Trajectory(row_id, domain, tuple(messages), reference)


def _cannot_fail(test: Any) -> bool:
    """Whether every program would pass the test: a comparison without assert, or a mere value, as {"input": "1"}."""
    if not isinstance(test, str):
        return True
    if "assert" in test:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            statements = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # then the test fails for every program
        return False
    return all(isinstance(one, ast.Expr) and isinstance(one.value, IDLE) for one in statements)


def _is_answer(answer: Any) -> bool:
    if isinstance(answer, str):
        return bool(answer.strip())
    return isinstance(answer, int | float) and not isinstance(answer, bool) and isfinite(answer)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
