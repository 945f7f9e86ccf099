"""Tests of LiveCodeBench problems as they are published, decoded without running anything.

A problem's `public_test_cases` is JSON. Its `private_test_cases` is that too, or base64(zlib(pickle(JSON text))). A
pickle is a program; here it is only read, by `pickletools`, and refused unless it is one string and nothing else. Its
compressed size does not bound its real one, so unpacking has a limit.

Source: the published files of livecodebench/code_generation_lite.
"""

import base64
import binascii
import json
import pickletools
import zlib
from dataclasses import dataclass
from typing import Any

STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
AROUND = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
"""Opcodes around a pickled string that have no effect."""
LIMIT = 1 << 30
"""Limit of a problem's unpacked tests, in bytes; the largest published ones take a fraction of it."""
KINDS = ("stdin", "functional")


@dataclass(frozen=True)
class Case:
    """Input of a program, and its expected output."""

    input: str
    output: str
    kind: str
    """stdin: a whole program; functional: a function, its arguments and result as JSON, an argument a line"""


def cases(public: str, private: str, limit: int = LIMIT) -> list[Case]:
    """All tests of a problem, public ones first.

    Raises:
        ValueError: there is no test, or the tests are not in the published format
    """
    found = [*_parse(public, "public"), *_parse(_unpacked(private, limit), "private")]
    if not found:
        raise ValueError("the problem has no tests, so every program would pass")
    return found


def _unpacked(private: str, limit: int) -> str:
    text = private.strip()
    if not text or text.startswith("["):
        return text
    try:
        packed = base64.b64decode(text, validate=True)
        unpacking = zlib.decompressobj()
        pickled = unpacking.decompress(packed, limit + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the private tests are neither JSON nor base64 of zlib ({error})") from error
    if len(pickled) > limit:
        raise ValueError(f"the private tests unpack to more than {limit} bytes")
    if not unpacking.eof:
        raise ValueError("the private tests are cut off")
    return _pickled_string(pickled)


def _pickled_string(pickled: bytes) -> str:
    found: list[str] = []
    refused = ""
    try:
        for code, argument, _ in pickletools.genops(pickled):
            if code.name in STRINGS:
                found.append(str(argument))
            elif code.name not in AROUND:
                refused = code.name
                break
    except (ValueError, EOFError, KeyError, IndexError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"the private tests are no pickle ({error})") from error
    if refused:
        raise ValueError(f"the private tests are a pickle with {refused}, which may run code; refused")
    if len(found) != 1:
        raise ValueError(f"the private tests are a pickle of {len(found)} strings, not of one")
    return found[0]


def _parse(text: str, which: str) -> list[Case]:
    if not text.strip():
        return []
    try:
        return [_case(entry) for entry in json.loads(text)]
    except (json.JSONDecodeError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"the {which} tests are not a list of tests ({type(error).__name__}: {error})") from error


def _case(entry: dict[str, Any]) -> Case:
    case = Case(entry["input"], entry["output"], entry["testtype"])
    if not isinstance(case.input, str) or not isinstance(case.output, str) or case.kind not in KINDS:
        raise TypeError(f"a test's input and output are text and its type is one of {', '.join(KINDS)}")
    return case
