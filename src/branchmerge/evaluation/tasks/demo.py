"""What the demo tasks' YAML files call: read assets/demo/benchmark, grade a response."""

import json
from typing import Any

from datasets import Dataset

from branchmerge.config import PROJECT
from branchmerge.evaluation.tasks import grading

grade = grading.grade_response


def load(part: str, split: str, **_: Any) -> dict[str, Dataset]:
    """Questions of one part (math, code, science) and split (test, or dev for tuning)."""
    path = PROJECT / "assets" / "demo" / "benchmark" / split / f"{part}.jsonl"
    return {"test": Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()])}
