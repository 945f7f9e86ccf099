"""What the demo's teacher wrote into assets/demo: reproducible, held out, and wrong exactly where it means to be."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from branchmerge.config import PROJECT, SourceConfig
from branchmerge.evaluation.graders import grade
from branchmerge.files import file_sha256
from branchmerge.trajectories import demo_teacher, sources
from branchmerge.trajectories.demo_teacher import DOMAINS, ERROR_SHARE, Problem, problems
from branchmerge.trajectories.schema import Message, Reference, Trajectory
from branchmerge.trajectories.selection import select

DEMO = PROJECT / "assets" / "demo"
TRAJECTORIES = sorted(path.stem for path in (DEMO / "trajectories").glob("*.jsonl"))
Work = tuple[str, int, int]


def benchmark(split: str, domain: str) -> list[dict[str, Any]]:
    lines = (DEMO / "benchmark" / split / f"{domain}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def trajectories(name: str) -> list[Trajectory]:
    return sources.read(SourceConfig(path=str(DEMO / "trajectories" / f"{name}.jsonl")))


def asked(domain: str) -> list[Problem]:
    """The benchmark's questions as the teacher knows them, with its solutions."""
    return list(islice(problems(domain), demo_teacher.TEST_ROWS + demo_teacher.DEV_ROWS))


def work(question: str) -> Work:
    """What a question of math asks to work out: ("*", 47, 6)."""
    bare = re.fullmatch(r"What is (\d+) ([*+]) (\d+)\?", question)
    if bare:
        return bare[2], int(bare[1]), int(bare[3])
    story = re.fullmatch(r"One box holds (\d+) (\w+)\. How many \2 are in (\d+) boxes\?", question)
    assert story, question
    return "*", int(story[1]), int(story[3])


def steps(response: str) -> set[Work]:
    """What the reasoning works out; the sum in 40*6 + 7*6 is none of numbers."""
    products = re.findall(r"(\d+)(\*)(\d+)", response)
    sums = re.findall(r"(?<![\d*])(\d+) (\+) (\d+)(?![\d*])", response)
    return {(sign, int(a), int(b)) for a, sign, b in [*products, *sums]}


def test_the_teacher_writes_the_very_files_of_the_repository(tmp_path: Path) -> None:
    demo_teacher.write(tmp_path)
    written, kept = (
        {str(path.relative_to(root)): file_sha256(path) for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path, DEMO)
    )
    assert written == kept


def test_every_file_is_small() -> None:
    assert [path for path in DEMO.rglob("*.jsonl") if path.stat().st_size >= 2_000_000] == []


def test_every_domain_has_trajectories_and_there_is_a_warmup() -> None:
    assert set(TRAJECTORIES) == {*DOMAINS, "warmup"}


@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_enough_questions_and_none_stands_in_both_splits(domain: str) -> None:
    test, dev = ([row["question"] for row in benchmark(split, domain)] for split in ("test", "dev"))
    assert len(test) >= 100 and len(dev) >= 50
    assert len({*test, *dev}) == len(test) + len(dev)


def test_no_benchmark_question_is_learned_from() -> None:
    held_out = {row["question"] for domain in DOMAINS for split in ("test", "dev") for row in benchmark(split, domain)}
    texts = [turn.content for name in TRAJECTORIES for row in trajectories(name) for turn in row.messages]
    assert [text for text in texts if text in held_out] == []
    assert not any(question in text for text in texts for question in held_out)


def test_no_question_of_math_asks_again_what_the_benchmark_asks() -> None:
    held_out = [work(row["question"]) for split in ("test", "dev") for row in benchmark(split, "math")]
    assert len(set(held_out)) == len(held_out)
    learned = {work(row.question) for name in ("math", "warmup") for row in trajectories(name) if row.domain == "math"}
    swapped = {("+", b, a) for sign, a, b in learned if sign == "+"}
    assert set(held_out) & (learned | swapped) == set()


def test_no_reasoning_works_out_what_the_benchmark_asks() -> None:
    held_out = {work(row["question"]) for split in ("test", "dev") for row in benchmark(split, "math")}
    rows = [row for name in ("math", "warmup") for row in trajectories(name) if row.domain == "math"]
    given_away = {step for row in rows for step in steps(row.response) if step[0] == work(row.question)[0]}
    assert held_out & given_away == set()


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_teacher_errs_in_exactly_its_share_of_the_rows(name: str) -> None:
    rows = trajectories(name)
    found = select(rows, check=True, progress=False)
    assert len(rows) - len(found.rows) == round(ERROR_SHARE * len(rows))
    assert set(found.dropped) <= {"wrong_answer", "failed_test"}
    assert all(row.reference is not None for row in rows)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_benchmark_is_what_the_teacher_was_asked(domain: str) -> None:
    rows = [*benchmark("test", domain), *benchmark("dev", domain)]
    told = [(problem.question, problem.reference) for problem in asked(domain)]
    assert [(row["question"], row["reference"]) for row in rows] == told
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
def test_solutions_of_the_benchmark_are_graded_as_they_are_meant(domain: str, right: bool) -> None:
    rows = []
    # A program takes a process; that the wrong ones fail is seen on a part of them.
    for number, problem in enumerate(asked(domain)[:: 1 if right or domain != "code" else 4]):
        response = (problem.right if right else problem.wrong).text()
        messages = (Message("user", problem.question), Message("assistant", response))
        rows.append(Trajectory(str(number), domain, messages, Reference.parse(problem.reference)))
    kept = select(rows, check=True, progress=False).rows
    assert [row.id for row in kept] == ([row.id for row in rows] if right else [])


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_wrong_solution_has_an_answer(domain: str) -> None:
    verdict = grade(asked(domain)[0].wrong.text(), Reference.parse(asked(domain)[0].reference))
    assert (verdict.correct, verdict.reason) in [(False, "wrong_answer"), (False, "failed_test")]
