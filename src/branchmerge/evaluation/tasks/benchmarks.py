"""What the published benchmarks' YAML files call: load the checked questions, grade the k responses of one.

All arguments come from the task's metadata, so that one `--metadata` (or `TaskManager(metadata=...)`) changes them:
data_dir, prompt_style and, for livecodebench, livecodebench_release, livecodebench_start, livecodebench_end,
livecodebench_grader.
"""

import hashlib
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value

from branchmerge.evaluation import questions
from branchmerge.evaluation.livecodebench import problems
from branchmerge.evaluation.livecodebench.grading import STRICT
from branchmerge.evaluation.tasks import grading

grade = grading.grade_responses


def aime24(data_dir: str | None = None, prompt_style: str = "plain", **_: Any) -> dict[str, Dataset]:
    """See `questions.aime24`."""
    return {"test": Dataset.from_list(questions.aime24(data_dir, prompt_style))}


def aime25(data_dir: str | None = None, prompt_style: str = "plain", **_: Any) -> dict[str, Dataset]:
    """See `questions.aime25`."""
    return {"test": Dataset.from_list(questions.aime25(data_dir, prompt_style))}


def math500(data_dir: str | None = None, prompt_style: str = "plain", **_: Any) -> dict[str, Dataset]:
    """See `questions.math500`."""
    return {"test": Dataset.from_list(questions.math500(data_dir, prompt_style))}


def gpqa_diamond(data_dir: str | None = None, prompt_style: str = "plain", **_: Any) -> dict[str, Dataset]:
    """See `questions.gpqa_diamond`."""
    return {"test": Dataset.from_list(questions.gpqa_diamond(data_dir, prompt_style))}


def livecodebench(
    data_dir: str | None = None,
    prompt_style: str = "plain",
    livecodebench_release: str = problems.RELEASE,
    livecodebench_start: str = problems.START,
    livecodebench_end: str = problems.END,
    livecodebench_grader: str = STRICT,
    **_: Any,
) -> dict[str, Dataset]:
    """See `problems.livecodebench`."""
    found = problems.livecodebench(
        data_dir, prompt_style, livecodebench_release, livecodebench_start, livecodebench_end, livecodebench_grader
    )
    text = Value("string")
    # A whole release's tests pass the 2 GiB that a column of plain strings can hold.
    reference = {"grader": text, "public": text, "private": Value("large_string"), "function": text}
    features = Features({"id": text, "question": text, "reference": reference})
    # Dataset.from_list, and a fingerprint of the library's own making, would hold the tests several times over.
    table = pyarrow.Table.from_pylist(found, schema=features.arrow_schema)
    return {"test": Dataset(table, fingerprint=_fingerprint(found))}


def _fingerprint(documents: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in (document["id"], document["question"], *document["reference"].values()):
            digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()[:16]
