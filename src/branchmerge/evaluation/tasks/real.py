"""What the tasks on upstream rows call: read files as downloaded from the folder `study.data_dir`, grade a response."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from branchmerge.config import SourceConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.tasks import grading
from branchmerge.trajectories import sources

grade = grading.grade_response


def load(file: str, format: str, split: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Questions and references of a file in one of the formats of `trajectories.sources`."""
    if data_dir is None:
        raise UserError(f"study.data_dir has no value; it is the folder that holds {file}")
    rows = sources.read(SourceConfig(path=str(Path(data_dir) / file), format=format, split=split))
    docs = []
    for row in rows:
        assert row.reference is not None
        reference = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(row.reference).items()}
        docs.append({"id": row.id, "question": row.question, "reference": reference})
    return {"test": Dataset.from_list(docs)}
