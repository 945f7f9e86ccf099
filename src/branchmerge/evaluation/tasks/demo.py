"""What the demo tasks' YAML files call: read assets/demo/benchmark, grade a response."""

from typing import Any

from datasets import Dataset, load_dataset

from branchmerge.config import PROJECT
from branchmerge.evaluation.tasks import grading

grade = grading.grade_response


def load(part: str, split: str, **_: Any) -> dict[str, Dataset]:
    """Questions of one part (math, code, science) and split (test, or dev for tuning)."""
    path = PROJECT / "assets" / "demo" / "benchmark" / split / f"{part}.jsonl"
    return {"test": load_dataset("json", data_files=str(path), split="train")}
