"""Raw rows in, trajectories out: JSONL files and hub datasets, each in one of the known formats."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from branchmerge.config import SourceConfig, TrainConfig, project_path
from branchmerge.errors import UserError
from branchmerge.evaluation.prompts import BOXED
from branchmerge.files import file_sha256
from branchmerge.trajectories.schema import CHOICES, Trajectory

LOCAL_SPLITS = ("all", "train", "test")
HELD_OUT_SHARE = 5
"""`split=test` of a file without splits holds one question in five."""
SPLIT_RULE = 2
"""Version of the rule that splits a file, raised whenever `split=train` and `split=test` get other rows"""


def _gsm8k(row: Any, row_id: str) -> Trajectory:
    """GSM8K: the worked solution becomes the reasoning, the number behind #### the answer."""
    worked, marked, answer = row["answer"].rpartition("####")
    if not marked:
        raise ValueError("its answer has no #### before the number")
    thought = re.sub(r"<<[^>]*>>", "", worked).strip()
    answer = answer.strip().replace(",", "")
    return _trajectory(
        row_id, "math", row["question"], f"<think>\n{thought}\n</think>\n\n\\boxed{{{answer}}}",
        {"grader": "math", "answer": answer},
    )  # fmt: skip


def _mbpp(row: Any, row_id: str) -> Trajectory:
    """MBPP: the task with its tests, answered by the program (the data set has no reasoning)."""
    tests = "\n".join(row["test_list"])
    code = row["code"].replace("\r\n", "\n").strip()
    setup = [row["test_setup_code"]] if row.get("test_setup_code") else []
    return _trajectory(
        row_id, "code", f"{row['text'].strip()}\nYour code should pass these tests:\n{tests}",
        f"```python\n{code}\n```", {"grader": "code", "tests": [*setup, *row["test_list"]]},
    )  # fmt: skip


def _mmlu(row: Any, row_id: str) -> Trajectory:
    """MMLU: four choices, answered by the letter (the data set has no reasoning)."""
    number = int(row["answer"])
    if not 0 <= number < len(row["choices"]) <= len(CHOICES):
        raise ValueError(f"its answer {number} is none of its {len(row['choices'])} choices")
    options = "\n".join(f"{CHOICES[i]}. {choice}" for i, choice in enumerate(row["choices"]))
    letter = CHOICES[number]
    return _trajectory(
        row_id, "science", f"{row['question'].strip()}\n{options}\nAnswer with the letter.",
        f"\\boxed{{{letter}}}", {"grader": "choice", "answer": letter},
    )  # fmt: skip


THOUGHTS = (
    ("<|begin_of_thought|>", "<think>"),
    ("<|end_of_thought|>", "</think>"),
    ("<|begin_of_solution|>", ""),
    ("<|end_of_solution|>", ""),
)


def _openthoughts(row: Any, row_id: str) -> Trajectory:
    """OpenThoughts-114k; no reference. Only its subset `metadata` says which domain a row belongs to."""
    if "conversations" in row:
        return _openthoughts_marked(row, row_id)
    return _reasoned(_openthoughts_question(row), row["deepseek_reasoning"], row["deepseek_solution"], row_id)


def _openthoughts_question(row: Any) -> str:
    """The problem with the form that its answer has; the text in `metadata` does not state the form."""
    problem = row["problem"].strip()
    if row["domain"] == "math":
        return f"{problem}\n{BOXED}"
    if row["domain"] != "code":
        return problem
    if not json.loads(row["test_cases"] or "{}").get("fn_name"):
        how = "Write a Python program that solves this problem: it reads from standard input and prints the answer."
    else:
        how = "Write a Python function that solves this problem; do not call it."
    return "\n".join(part for part in (f"{how}\n\n{problem}", (row["starter_code"] or "").strip("\n")) if part)


def _openthoughts_marked(row: Any, row_id: str) -> Trajectory:
    """One turn each, reasoning and answer between markers."""
    said = {turn["from"]: turn["value"] for turn in row["conversations"]}
    if len(row["conversations"]) != 2:
        raise ValueError(f"it has {len(row['conversations'])} turns, not one of each")
    response = said["assistant"]
    for mark, plain in THOUGHTS:
        response = response.replace(mark, plain)
    thought, marked, answer = response.partition("</think>")
    if not marked:
        raise ValueError("its answer has no <|end_of_thought|>")
    thought = thought.replace("<think>", "")
    return _reasoned(said["user"], thought, answer, row_id)


def _s1(row: Any, row_id: str) -> Trajectory:
    """s1K-1.1: DeepSeek-R1's reasoning and answer; no reference, as its solutions have many forms."""
    return _reasoned(row["question"], row["deepseek_thinking_trajectory"], row["deepseek_attempt"], row_id)


def _reasoned(question: str, thought: str, answer: str, row_id: str) -> Trajectory:
    """A trajectory without a reference."""
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"<think>\n{thought.strip()}\n</think>\n\n{answer.strip()}"},
    ]
    return Trajectory.parse({"messages": messages}, row_id)


def _trajectory(row_id: str, domain: str, question: str, response: str, reference: dict[str, Any]) -> Trajectory:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return Trajectory.parse({"domain": domain, "messages": messages, "reference": reference}, row_id)


FORMATS: dict[str, Callable[[Any, str], Trajectory]] = {
    "messages": Trajectory.parse,
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "mmlu": _mmlu,
    "openthoughts": _openthoughts,
    "s1": _s1,
}

STEMS = {"mbpp": "text", "mmlu": "question"}
"""Formats in which rows may repeat a question with other tests or choices, and the field that such rows share"""


def read(source: SourceConfig) -> list[Trajectory]:
    """Read and check all rows of a source; raises UserError with file and line number on a row that cannot be used."""
    if source.format not in FORMATS:
        raise UserError(f"format={source.format}: choose one of {', '.join(FORMATS)}")
    if is_local(source) and source.split not in LOCAL_SPLITS:
        raise UserError(f"{source.path}: split={source.split}: of a file, choose one of {', '.join(LOCAL_SPLITS)}")
    convert = FORMATS[source.format]
    rows: list[Trajectory] = []
    others: list[str] = []
    for where, row_id, raw in _raw_rows(source):
        try:
            other = [f"{name}={raw[name]}" for name, values in source.where.items() if raw[name] not in values]
            if other:
                others += [each for each in other if each not in others][: 10 - len(others)]
                continue
            row = convert(raw, row_id)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: not a row of format {source.format}: {reason}") from error
        asked = raw[STEMS[source.format]] if source.format in STEMS else row.question
        if is_local(source) and source.split != "all" and is_held_out(asked) != (source.split == "test"):
            continue
        rows.append(row)
        if source.limit is not None and len(rows) == source.limit:
            break
    if not rows:
        wanted = f"none is where={source.where}, but {', '.join(others)}" if others else "a corpus needs at least one"
        raise UserError(f"{source.path}: no rows; {wanted}")
    return rows


def of_branch(config: TrainConfig) -> dict[str, SourceConfig]:
    """The sources of a branch by name: `data.path` where it is given, else the domain's parts of the study's corpus."""
    if config.data.path is not None:
        return {"data.path": SourceConfig(path=config.data.path, format=config.data.format, limit=config.data.limit)}
    return of_parts(config, config.domain.parts)


def of_parts(config: TrainConfig, parts: Sequence[str]) -> dict[str, SourceConfig]:
    """The sources of parts of the study's corpus by name; of `science`, `science` and `science-...`.

    A name with a budget of its own is a domain, whatever it begins with.
    """
    corpus, domains = config.study.corpus, config.study.budget
    return {
        name: at_most(source, config.data.limit)
        for part in parts
        for name, source in corpus.items()
        if name == part or (name.startswith(f"{part}-") and name not in domains)
    }


def read_branch(config: TrainConfig) -> dict[str, list[Trajectory]]:
    """Read and check every row of every source of a branch; raises UserError at the first that cannot be used."""
    return {name: read(source) for name, source in of_branch(config).items()}


def check_files(config: TrainConfig) -> None:
    """Refuse sources of a branch whose files are missing, without reading any."""
    for source in of_branch(config).values():
        if is_local(source):
            _file(source)


def unpinned(config: TrainConfig) -> list[str]:
    """Names of the branch's hub datasets without a revision, whose rows cannot be identified later."""
    return [name for name, source in of_branch(config).items() if not is_local(source) and source.revision is None]


def at_most(source: SourceConfig, limit: int | None) -> SourceConfig:
    """The source with no more rows than `limit`; None changes nothing."""
    return source if limit is None else replace(source, limit=min(limit, source.limit or limit))


def is_held_out(question: str) -> bool:
    """Whether a question of a file without splits belongs to its test part; depends only on its words."""
    words = " ".join(question.split())
    return hashlib.sha256(words.encode()).digest()[0] % HELD_OUT_SHARE == 0


def is_local(source: SourceConfig) -> bool:
    """Whether the path means a file; a hub dataset is `owner/name` without a file suffix.

    A path that exists here is never a hub dataset: `datasets` would read that folder, whose rows have no revision.
    """
    path = source.path
    return (
        project_path(path).exists()
        or path.startswith(("project:", "/", ".", "~"))
        or path.endswith((".jsonl", ".json"))
        or path.count("/") != 1
    )


def identity(source: SourceConfig) -> str:
    """Identifies the rows: the file's SHA-256, or the hub dataset's revision."""
    return file_sha256(_file(source)) if is_local(source) else f"{source.path}@{source.revision}"


def described(source: SourceConfig) -> dict[str, Any]:
    """A source as it is recorded in manifests."""
    fields = asdict(source)
    if not source.where:
        del fields["where"]  # so that manifests written before this field existed still match
    rule = {"split_rule": SPLIT_RULE} if is_local(source) and source.split != "all" else {}
    return {**fields, "sha256": identity(source), **rule}


def _file(source: SourceConfig) -> Path:
    path = project_path(source.path)
    if path.is_dir():
        raise UserError(f"{source.path}: is a folder; give a JSONL file of trajectories with data.path=")
    if not path.is_file():
        raise UserError(f"{source.path}: no such file; give a JSONL file of trajectories with data.path=")
    if not os.access(path, os.R_OK):
        raise UserError(f"{source.path}: may not be read by this user; change its permissions")
    return path


def _raw_rows(source: SourceConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield (location, default id, raw row)."""
    if is_local(source):
        path = _file(source)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    raw = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not UTF-8 text ({error.reason}); unpack or convert the file"
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
                yield f"{path}:{number}", f"{path.stem}-{number:05d}", raw
        return
    from datasets import load_dataset

    try:
        dataset = load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:
        raise UserError(
            f"{source.path}: cannot be loaded from the Hugging Face hub ({type(error).__name__}: {error});"
            " check the name and the network, or give a local file with data.path="
        ) from error
    for number, raw in enumerate(dataset):
        yield f"{source.path}[{number}]", f"{source.path.split('/')[-1]}-{number:06d}", raw
