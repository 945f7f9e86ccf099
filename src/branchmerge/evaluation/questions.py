"""The questions of AIME, MATH-500 and GPQA-Diamond as documents, their contents checked.

A document is {"id", "question": the user turn, "reference": what a correct answer is}, see `trajectories.schema`.
Before a model loads, the number of questions, their distinct ids and the kind of their answers are checked.
LiveCodeBench: `livecodebench.problems`.
"""

import hashlib
from collections.abc import Callable
from itertools import permutations
from typing import Any

from branchmerge.errors import UserError
from branchmerge.evaluation import prompts
from branchmerge.evaluation.answers import integer
from branchmerge.evaluation.benchmark_files import AIME24, AIME25, GPQA, MATH500, HubFiles, rows

Document = dict[str, Any]
ORDERS = list(permutations(range(len(prompts.LETTERS))))
GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def aime24(data_dir: str | None = None, style: str = "plain") -> list[Document]:
    """The 30 problems of AIME 2024 I and II.

    Args:
        data_dir: folder with the files as downloaded, see `benchmark_files`; None for the hub
        style: of the prompt, see `prompts`

    Raises:
        UserError: files are missing or are not what they should be
    """
    return _documents(AIME24, data_dir, 30, lambda row, where: _aime(row, where, ("ID", "Problem", "Answer"), style))


def aime25(data_dir: str | None = None, style: str = "plain") -> list[Document]:
    """The 30 problems of AIME 2025 I and II; as `aime24`."""
    return _documents(AIME25, data_dir, 30, lambda row, where: _aime(row, where, ("id", "problem", "answer"), style))


def math500(data_dir: str | None = None, style: str = "plain") -> list[Document]:
    """The 500 problems of MATH-500; as `aime24`."""

    def document(row: dict[str, Any], where: str) -> Document:
        question = prompts.math_question(text(row, "problem", where), style)
        reference = {"grader": "math", "answer": text(row, "answer", where)}
        return {"id": text(row, "unique_id", where), "question": question, "reference": reference}

    return _documents(MATH500, data_dir, 500, document)


def gpqa_diamond(data_dir: str | None = None, style: str = "plain") -> list[Document]:
    """The 198 questions of GPQA-Diamond, the order of the choices decided by the record's id; as `aime24`."""
    return _documents(GPQA, data_dir, 198, lambda row, where: _gpqa(row, where, style))


def choice_order(record_id: str) -> tuple[int, ...]:
    """A permutation of the four choices that depends on the id and on nothing else."""
    digest = hashlib.sha256(record_id.encode()).digest()
    return ORDERS[int.from_bytes(digest, "big") % len(ORDERS)]


def text(row: dict[str, Any], column: str, where: str) -> str:
    """A cell that must not be empty; raises UserError."""
    value = row.get(column)
    found = "" if value is None else str(value).strip()
    if not found:
        raise UserError(f"{where}: the column {column!r} is missing or empty; is this the right file?")
    return found


def check_ids(documents: list[Document], task: str) -> None:
    """Raises UserError if two documents share an id, or if there is none."""
    seen: set[str] = set()
    for document in documents:
        if document["id"] in seen:
            raise UserError(
                f"{task}: the id {document['id']} stands for two questions; the files are not the published ones"
            )
        seen.add(document["id"])
    if not documents:
        raise UserError(f"{task} has no questions")


def check_count(documents: list[Document], task: str, expected: int) -> None:
    """Raises UserError if there are more or fewer questions than the benchmark has."""
    if len(documents) != expected:
        raise UserError(
            f"{task} has {expected} questions, but {len(documents)} were read; the files are not the published ones"
        )


def _documents(
    source: HubFiles, data_dir: str | None, count: int, document: Callable[[dict[str, Any], str], Document]
) -> list[Document]:
    found = [document(row, where) for where, row in rows(source, data_dir)]
    check_count(found, source.task, count)
    check_ids(found, source.task)
    return found


def _aime(row: dict[str, Any], where: str, columns: tuple[str, str, str], style: str) -> Document:
    name, problem, answer = (text(row, column, where) for column in columns)
    # In a box, so that the whole cell is parsed as the answer; some cells are like 336^\circ.
    number = integer(f"\\boxed{{{answer}}}")
    if number is None or not 0 <= number <= 999:
        raise UserError(f"{where}: the answer {answer!r} of {name} is no integer from 0 to 999, as those of AIME are")
    reference = {"grader": "integer", "answer": str(number)}
    return {"id": name, "question": prompts.math_question(problem, style), "reference": reference}


def _gpqa(row: dict[str, Any], where: str, style: str) -> Document:
    name, question = text(row, "Record ID", where), text(row, "Question", where)
    published = [text(row, column, where) for column in GPQA_CHOICES]
    if len(set(published)) != len(published):
        raise UserError(f"{where}: two of the four choices of {name} are the same, so no letter is the answer")
    order = choice_order(name)
    reference = {"grader": "choice", "answer": prompts.LETTERS[order.index(0)]}
    asked = prompts.choice_question(question, [published[place] for place in order], style)
    return {"id": name, "question": asked, "reference": reference}
