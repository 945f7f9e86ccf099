"""Tests of LiveCodeBench problems: as published, and as an attacker would publish them."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.evaluation.livecodebench.cases import Case, cases

PUBLIC = json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}])
PRIVATE = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}, *json.loads(PUBLIC)]


def packed(value: Any, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_public_and_private_tests(protocol: int) -> None:
    expected = [Case("1 2\n", "3\n", "stdin"), Case("[1, 2]\n3", "6", "functional"), Case("1 2\n", "3\n", "stdin")]
    assert cases(PUBLIC, packed(json.dumps(PRIVATE), protocol)) == expected


def test_private_tests_may_be_plain_json() -> None:
    assert len(cases("[]", json.dumps(PRIVATE))) == 2
    assert len(cases(PUBLIC, "")) == 1


@given(st.text(), st.text())
def test_any_text_survives(given: str, output: str) -> None:
    tests = [{"input": given, "output": output, "testtype": "stdin"}]
    assert cases("[]", packed(json.dumps(tests, ensure_ascii=False))) == [Case(given, output, "stdin")]


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "attacked"
    attack = packed(Attack(target), protocol)
    with pytest.raises(ValueError, match="which may run code; refused"):
        cases(PUBLIC, attack)
    assert not target.exists()
    pickle.loads(zlib.decompress(base64.b64decode(attack)))
    assert target.exists()  # it is an attack


def test_a_bomb_is_not_unpacked() -> None:
    bomb = base64.b64encode(zlib.compress(b"\0" * 20_000_000)).decode()
    assert len(bomb) < 30_000
    with pytest.raises(ValueError, match="unpack to more than 1000000 bytes"):
        cases(PUBLIC, bomb, limit=1_000_000)


@pytest.mark.parametrize(
    ("private", "why"),
    [
        ("no base64!", "neither JSON nor base64"),
        (base64.b64encode(b"no zlib").decode(), "neither JSON nor base64 of zlib"),
        (packed(json.dumps(PRIVATE))[:40], "cut off"),
        (base64.b64encode(zlib.compress(b"no pickle")).decode(), "no pickle|may run code|not of one"),
        (packed(["[]"]), "may run code"),
        (packed(7), "may run code|not of one"),
        (packed("{"), "not a list of tests"),
        (packed("[1]"), "not a list of tests"),
        (packed('[{"input": "1"}]'), "not a list of tests"),
        (packed('[{"input": 1, "output": "2", "testtype": "stdin"}]'), "are text"),
        (packed('[{"input": "1", "output": "2", "testtype": "exec"}]'), "stdin, functional"),
    ],
)
def test_what_cannot_be_read_is_said(private: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        cases(PUBLIC, private)


@pytest.mark.parametrize("private", ["", "[]", packed("[]")])
def test_a_problem_without_tests_is_an_error(private: str) -> None:
    with pytest.raises(ValueError, match="no tests, so every program would pass"):
        cases("[]", private)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(raw: bytes) -> None:
    try:
        found = cases(PUBLIC, base64.b64encode(zlib.compress(raw)).decode())
    except ValueError:
        return
    assert found
