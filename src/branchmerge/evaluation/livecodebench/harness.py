"""Code that runs beside a solution in the sandbox: common imports, and the call of a function and report of its result.

The grader sends this file's text as a program, so it imports nothing of this package. It knows the solution and one
case's arguments, never the expected result: whatever the solution finds, overrides or writes here can only change its
own answer.
"""

import json
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
"""Modules whose names a solution may use without importing them; of equal names the last one's counts, so `pow` is the
builtin and `datetime` the module. The order is LiveCodeBench's."""
RECURSION = 50_000
DIGITS = 50_000
"""Longest integer that may be turned into text, as LiveCodeBench sets it; Python's own limit is 4300."""
LIMITS = f"sys.setrecursionlimit({RECURSION})\nsys.set_int_max_str_digits({DIGITS})\n"
PREAMBLE = "".join(f"from {name} import *\n" for name in (*MODULES, "builtins", "typing"))
PREAMBLE += f"import {', '.join(MODULES)}\n{LIMITS}"

CONTENT: list[tuple[type, Callable[[Any], Any]]] = [
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (list, lambda value: list(list.__iter__(value))),
    (dict, lambda value: dict(dict.items(value))),
]
"""How to read the content of a subclass instance in spite of the methods that it overrides."""


def encode(value: Any, official: bool = False) -> Any:
    """A result as JSON from which the grader can tell what it equals, by the content of its built-in base type.

    Args:
        official: as LiveCodeBench compares: a nested tuple equals nothing, and an object's own __eq__ decides; it is
            called here with the object's content and with an object that it cannot know
    """
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is float or kind is str:
        return value
    if official and kind is not list and kind is not dict and value == object():
        return {"anything": True}
    for base, content in CONTENT:
        if isinstance(value, base):
            plain = content(value)
            if official and kind is not base and not value == plain:  # noqa: SIM201 - __ne__ may say otherwise
                break
            if base is list:
                return [encode(item, official) for item in plain]
            if base is dict:
                return {"pairs": [[encode(key, official), encode(item, official)] for key, item in plain.items()]}
            return plain
    if kind.__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        plain = value.item()
        if type(plain) in (bool, int, float):  # a long double has no built-in equivalent
            return plain
    if isinstance(value, tuple) and not official:
        return [encode(item) for item in tuple.__iter__(value)]
    if kind.__module__ in ("decimal", "fractions"):
        try:
            return {"ratio": list(value.as_integer_ratio())}
        except (ValueError, OverflowError):  # not a number, infinite
            pass
    return {"other": kind.__name__}


def reporter(token: str) -> Callable[[Any], None]:
    """Redirect standard output to nowhere; returns a function that writes an answer to the real one.

    The token in front of it tells an answer from anything that the solution writes to the same file.
    """
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    # Bound now, as a solution may replace them.
    dumps, fdopen = json.dumps, os.fdopen

    def report(value: Any) -> None:
        with fdopen(answer, "wb") as file:
            file.write(token.encode() + dumps(value).encode())

    return report


def find(module: ModuleType, given: dict[str, Any], name: str) -> Callable[..., Any] | None:
    """The method of the solution's `Solution`, or its function of that name; not a function of the preamble."""
    for owner in (getattr(module, "Solution", None), module):
        if isinstance(owner, type) and callable(getattr(owner, name, None)):
            return getattr(owner(), name)
    found = getattr(module, name, None)
    return found if callable(found) and found is not given.get(name) else None


def call_function() -> None:
    """Read a task from standard input, call the function once, report what it returns."""
    task = json.loads(sys.stdin.read())
    report = reporter(task["token"])
    encode_, dictionary, arguments = encode, dict, [json.loads(line) for line in task["arguments"]]
    # Not __main__: LeetCode imports a solution. Registered, since dataclasses and pickle look modules up.
    module = sys.modules["solution"] = ModuleType("solution")
    exec(task["preamble"], module.__dict__)
    given = dictionary(module.__dict__)
    exec(compile(task["solution"], "solution.py", "exec", 0, True), module.__dict__)
    function = find(module, given, task["function"])
    report({"no_function": True} if function is None else {"value": encode_(function(*arguments))})
