"""Made-up rows of the published benchmarks in the formats of their files, as many as there are of the real ones."""

import base64
import csv
import json
import pickle
import random
import zlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Rows = list[dict[str, Any]]
FILES = {
    "aime24": "aime_2024_problems.parquet", "aime25": "test.jsonl", "math500": "test.jsonl",
    "gpqa_diamond": "gpqa_diamond.csv", "livecodebench": "test.jsonl",
}  # fmt: skip


def words(random_: random.Random, count: int) -> str:
    return " ".join("".join(random_.choices("abcdefgh", k=5)) for _ in range(count))


def aime24() -> Rows:
    return [
        {
            "ID": f"2024-{part}-{n}",
            "Problem": f"What is {n} + {len(part)}?",
            "Solution": "Add.",
            "Answer": n + len(part),
        }
        for part in ("I", "II")
        for n in range(1, 16)
    ]


def aime25() -> Rows:
    # As upstream: text, and one answer in degrees.
    return [
        {"problem": f"What is {n} * 30?", "answer": str(n * 30) + ("^\\circ" if n == 7 else ""), "id": str(n)}
        for n in range(30)
    ]


def math500() -> Rows:
    return [
        {"problem": f"What is {n} / 7?", "solution": "Divide.", "answer": f"\\frac{{{n}}}{{7}}", "subject": "Algebra",
         "level": 1 + n % 5, "unique_id": f"test/algebra/{n}.json"}
        for n in range(500)
    ]  # fmt: skip


def gpqa_diamond() -> Rows:
    random_ = random.Random(0)
    return [
        {"Pre-Revision Question": "", "Question": f"Question {n}, in two lines:\n{words(random_, 6)}?",
         "Correct Answer": f"{words(random_, 3)}\n", "Incorrect Answer 1": words(random_, 3),
         "Incorrect Answer 2": words(random_, 3), "Incorrect Answer 3": words(random_, 3), "Explanation": "",
         "Record ID": f"rec{random_.getrandbits(60):x}"}
        for n in range(198)
    ]  # fmt: skip


def packed(tests: Any) -> str:
    """Private tests as upstream packs them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def coding_problem(n: int, date: datetime) -> dict[str, Any]:
    """Odd ones: a program that adds n to the number it reads; even ones: a method that adds n to its argument."""
    kind = "stdin" if n % 2 else "functional"
    public, private = ([{"input": str(x), "output": str(x + n), "testtype": kind}] for x in (1, 1000))
    starter = f"class Solution:\n    def add{n}(self, x: int) -> int:\n        "
    return {
        "question_title": f"Add {n}", "question_content": f"Add {n} to a number.\n", "platform": "leetcode",
        "question_id": f"q{n}", "contest_id": "c", "contest_date": date.isoformat(), "difficulty": "easy",
        "starter_code": "" if n % 2 else starter, "public_test_cases": json.dumps(public),
        # Some are packed, some are plain JSON, as upstream.
        "private_test_cases": packed(private) if n % 3 else json.dumps(private),
        "metadata": json.dumps({} if n % 2 else {"func_name": f"add{n}"}),
    }  # fmt: skip


def solution(n: int, wrong: int = 0) -> str:
    """The program that solves `coding_problem(n)`; with `wrong`, one that passes the public test only."""
    value = f"x + {n} + ({wrong} if x > 500 else 0)"
    if n % 2:
        return f"x = int(input())\nprint({value})\n"
    return f"class Solution:\n    def add{n}(self, x):\n        return {value}\n"


def livecodebench() -> Rows:
    """279 problems in the paper's window, its two ends among them, and five around it."""
    first, last = datetime(2024, 8, 1), datetime(2025, 2, 1)
    inside = [first, last, *(first + timedelta(hours=15 * n) for n in range(1, 278))]
    second = timedelta(seconds=1)
    around = [first - second, last + second, datetime(2023, 5, 7), datetime(2024, 7, 20), datetime(2025, 2, 8)]
    return [coding_problem(n, date) for n, date in enumerate([*around, *inside])]


ROWS = {
    "aime24": aime24, "aime25": aime25, "math500": math500, "gpqa_diamond": gpqa_diamond,
    "livecodebench": livecodebench,
}  # fmt: skip


def write(data_dir: Path, task: str, rows: Rows) -> None:
    """Write a task's rows where `data_dir` has them, in their format; LiveCodeBench's into the five files of v5."""
    folder = data_dir / task
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[task]
    if task == "aime24":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif task == "gpqa_diamond":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif task == "livecodebench":
        for number in range(5):
            jsonl(folder / f"test{number + 1 if number else ''}.jsonl", rows[number::5])
    else:
        jsonl(path, rows)


def jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
