"""The problems of a LiveCodeBench release inside a window of dates as documents, their contents checked.

A problem's tests stay packed in its document, as published; unpacked, all tests take gigabytes. Here only their
beginning is checked; the grader unpacks the tests of one problem at a time (`livecodebench.cases`).
"""

import base64
import binascii
import json
import re
import zlib
from datetime import datetime
from typing import Any

from branchmerge.errors import UserError
from branchmerge.evaluation import prompts
from branchmerge.evaluation.benchmark_files import livecodebench as release_files
from branchmerge.evaluation.benchmark_files import rows
from branchmerge.evaluation.livecodebench.cases import cases
from branchmerge.evaluation.livecodebench.grading import OFFICIAL, STRICT
from branchmerge.evaluation.questions import Document, check_count, check_ids, text

RELEASE, START, END = "release_v5", "2024-08-01", "2025-02-01"
"""The window of the paper."""
COUNTS = {(RELEASE, START, END): 279}
"""Problems of the windows whose number is known."""
PEEK = 4096
"""Characters of the packed tests that are checked; a multiple of 4, for base64."""


def livecodebench(
    data_dir: str | None = None,
    style: str = "plain",
    release: str = RELEASE,
    start: str = START,
    end: str = END,
    grader: str = STRICT,
) -> list[Document]:
    """The problems of a release whose contest was in a window.

    Args:
        data_dir: folder with the files as downloaded, see `benchmark_files`; None for the hub
        style: of the prompt, see `prompts`
        release: release_v1, ...; a later one holds all problems of those before
        start: first date, YYYY-MM-DD
        end: last date, of which only midnight belongs to the window, as in LiveCodeBench's own code
        grader: strict or official, see `grading`

    Raises:
        UserError: files are missing or are not what they should be, or the window makes no sense
    """
    if grader not in (STRICT, OFFICIAL):
        raise UserError(f"livecodebench_grader={grader}: choose {STRICT} or {OFFICIAL}")
    first, last = _date(start, "livecodebench_start"), _date(end, "livecodebench_end")
    if first >= last:
        raise UserError(
            f"livecodebench_start={start} is not before livecodebench_end={end}, so no problem can be asked"
        )
    documents = []
    for where, row in rows(release_files(release), data_dir):
        if first <= _date(text(row, "contest_date", where), f"{where}: contest_date") <= last:
            documents.append(_document(row, where, style, grader))
    if not documents:
        raise UserError(f"livecodebench: {release} has no problem from {start} to {end}")
    if (release, start, end) in COUNTS:
        check_count(documents, f"livecodebench ({release}, {start} to {end})", COUNTS[release, start, end])
    check_ids(documents, "livecodebench")
    return documents


def _date(written: str, what: str) -> datetime:
    try:
        return datetime.fromisoformat(written).replace(tzinfo=None)
    except ValueError:
        raise UserError(f"{what}={written} is no date; write it as 2024-08-01") from None


def _document(row: dict[str, Any], where: str, style: str, grader: str) -> Document:
    name = text(row, "question_id", where)
    public, private = (text(row, column, where) for column in ("public_test_cases", "private_test_cases"))
    try:
        has_public, has_private = _has_tests(public), _has_tests(private)
        function = json.loads(text(row, "metadata", where)).get("func_name") or ""
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: the tests of {name} cannot be read: {error}") from error
    if not has_public and not has_private:
        raise UserError(f"{where}: {name} has no tests, so every program would pass")
    if has_public and (cases(public, "")[0].kind == "functional") != bool(function):
        raise UserError(f"{where}: either the tests of {name} or its metadata say that it is a function, not both")
    name_of_grader = "livecodebench_official" if grader == OFFICIAL else "livecodebench"
    reference = {"grader": name_of_grader, "public": public, "private": private, "function": function}
    text(row, "question_content", where)
    # Both verbatim, including spaces at their ends, as LiveCodeBench puts them into its prompt.
    question = prompts.code_question(row["question_content"], row.get("starter_code") or "", style)
    return {"id": name, "question": question, "reference": reference}


def _has_tests(packed: str) -> bool:
    """Whether there is a first test; raises ValueError if that cannot be told."""
    if packed.startswith("["):
        return json.loads(packed) != [] and bool(cases(packed, ""))
    if len(packed) % 4:
        raise ValueError("they are neither JSON nor base64")
    try:
        pickled = zlib.decompressobj().decompress(base64.b64decode(packed[:PEEK], validate=True), PEEK)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"they are neither JSON nor base64 of zlib ({error})") from error
    # A pickled string: at most twenty bytes of framing, then the JSON text.
    beginning = re.match(rb".{1,20}?\[\s*(\{|\])", pickled, flags=re.DOTALL)
    if beginning is None:
        raise ValueError("what they unpack to does not begin as a list of tests")
    return beginning[1] == b"{"
