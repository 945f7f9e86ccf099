"""What is held out is asked in no row that is trained on, however that is written."""

import json
from pathlib import Path

from branches import branch

from branchmerge.data.datamodule import Corpus, prepare
from branchmerge.student.backbone import load_tokenizer
from branchmerge.trajectories.sources import read_branch

COPIES = ("{}", "{} ", "\n{}", "  {}")
"""Ways to write a question, under ids of their own; so are more spaces inside of it, and its accents"""


def question(number: int) -> str:
    return f"Combien font {number} caf\u00e9s et {number}?"


def held_out_of(questions: list[str], wanted: int, student: Path, folder: Path) -> Corpus:
    path = folder / "rows.jsonl"
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": "2"}] for asked in questions]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    config = branch(student, folder, "domain=math", f"data.path={path}", f"data.validation_rows={wanted}")
    return prepare(config, read_branch(config), load_tokenizer(student))


def test_copies_of_held_out_questions_are_not_trained_on(tiny_student: Path, tmp_path: Path) -> None:
    written = [copy.format(question(number)) for number in range(9) for copy in COPIES]
    written += [question(number).replace(" ", "  ") for number in range(9)]
    written += [question(number).replace("\u00e9", "e\u0301") for number in range(9)]
    corpus = held_out_of(written, 4, tiny_student, tmp_path)
    kinds = list(range(9))
    copies = {f"rows-{line + 1:05d}": number_of(asked) for line, asked in enumerate(written)}
    held = [copies[document.id] for document in corpus.held_out["data.path"]]
    trained = [copies[document.id] for document in corpus.documents]
    assert len(set(held)) == 4 and sorted({*held, *trained}) == kinds
    assert not set(held) & set(trained)
    assert corpus.account["sources"]["data.path"]["dropped"]["held_out"] == 4 * (len(COPIES) + 2)


def number_of(asked: str) -> int:
    return int(asked.split()[2])


def test_other_questions_are_trained_on(tiny_student: Path, tmp_path: Path) -> None:
    corpus = held_out_of([question(number) for number in range(9)], 4, tiny_student, tmp_path)
    assert len(corpus.documents) == 5 and len(corpus.held_out["data.path"]) == 4


def test_what_is_not_trained_on_is_not_held_out(tiny_student: Path, tmp_path: Path) -> None:
    """Questions that hold a token that begins a turn."""
    asked = [question(number) + " <|im_start|>" * (number % 2) for number in range(9)]
    corpus = held_out_of(asked, 4, tiny_student, tmp_path)
    assert {document.id for document in corpus.held_out["data.path"]} < {f"rows-{line:05d}" for line in range(1, 10, 2)}


def test_what_is_held_out_does_not_depend_on_the_order_or_the_names_of_the_rows(
    tiny_student: Path, tmp_path: Path
) -> None:
    """Branches of a study read the same rows from files of their own; what one holds out, no other may train on."""
    asked = [question(number) for number in range(12)]
    found = []
    for name, written in (("one", asked), ("other", asked[::-1])):
        (tmp_path / name).mkdir()
        corpus = held_out_of(written, 4, tiny_student, tmp_path / name)
        lines = {f"rows-{line:05d}": text for line, text in enumerate(written, start=1)}
        found.append({lines[document.id] for document in corpus.held_out["data.path"]})
    assert found[0] == found[1] and len(found[0]) == 4
