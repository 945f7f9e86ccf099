"""Questions of the published benchmarks from files in the upstream formats; every check can fail."""

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import upstream

from branchmerge.errors import UserError
from branchmerge.evaluation import benchmark_files, questions
from branchmerge.evaluation.livecodebench import problems
from branchmerge.evaluation.livecodebench.cases import cases
from branchmerge.trajectories.schema import Reference

LOADERS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "aime24": questions.aime24, "aime25": questions.aime25, "math500": questions.math500,
    "gpqa_diamond": questions.gpqa_diamond, "livecodebench": problems.livecodebench,
}  # fmt: skip
COUNTS = {"aime24": 30, "aime25": 30, "math500": 500, "gpqa_diamond": 198, "livecodebench": 279}
GRADERS = {"aime24": "integer", "aime25": "integer", "math500": "math", "gpqa_diamond": "choice",
           "livecodebench": "livecodebench"}  # fmt: skip
IDS = {"aime24": "ID", "aime25": "id", "math500": "unique_id", "gpqa_diamond": "Record ID",
       "livecodebench": "question_id"}  # fmt: skip
TASKS = sorted(LOADERS)


def refused(folder: Path, task: str, rows: upstream.Rows, says: str, **options: str) -> None:
    """Loading these rows fails with one line that says so."""
    upstream.write(folder, task, rows)
    with pytest.raises(UserError, match=says) as failed:
        LOADERS[task](str(folder), **options)
    assert "\n" not in str(failed.value)


# ------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("task", TASKS)
def test_all_questions_are_there_with_ids_of_their_own(data_dir: Path, task: str) -> None:
    documents = LOADERS[task](str(data_dir))
    assert len({document["id"] for document in documents}) == len(documents) == COUNTS[task]
    assert {Reference.parse(document["reference"]).grader for document in documents} == {GRADERS[task]}
    assert LOADERS[task](str(data_dir)) == documents


def test_aime_answers_are_integers_however_upstream_writes_them(data_dir: Path) -> None:
    found = {d["id"]: d["reference"]["answer"] for d in questions.aime24(str(data_dir))}
    assert found == {row["ID"]: str(row["Answer"]) for row in upstream.aime24()}
    found = {d["id"]: d["reference"]["answer"] for d in questions.aime25(str(data_dir))}
    assert found == {str(n): str(30 * n) for n in range(30)}


def test_mathematics_is_asked_with_deepseeks_instruction_or_as_it_stands(data_dir: Path) -> None:
    for task in ("aime24", "aime25", "math500"):
        plain, tinyr1 = (LOADERS[task](str(data_dir), style=style) for style in ("plain", "tinyr1"))
        assert re.fullmatch(r"What is \d+ [-+*/] \d+\?", tinyr1[3]["question"])
        instruction = "Please reason step by step, and put your final answer within \\boxed{}."
        assert plain[3]["question"] == f"{tinyr1[3]['question']}\n{instruction}"


def test_the_letter_of_a_choice_question_is_that_of_its_right_choice(data_dir: Path) -> None:
    rows = {row["Record ID"]: row for row in upstream.gpqa_diamond()}
    for style, form in (("plain", "\n{}) {}\n"), ("tinyr1", "{}) {}")):
        for document in questions.gpqa_diamond(str(data_dir), style=style):
            row = rows[document["id"]]
            assert form.format(document["reference"]["answer"], row["Correct Answer"].strip()) in document["question"]
            assert all(row[column].strip() in document["question"] for column in questions.GPQA_CHOICES)
            assert row["Question"] in document["question"]


def test_the_order_of_choices_depends_on_the_id_alone_and_favours_no_letter(data_dir: Path) -> None:
    documents = questions.gpqa_diamond(str(data_dir))
    letters = Counter(document["reference"]["answer"] for document in documents)
    assert all(0.15 < letters[letter] / 198 < 0.35 for letter in "ABCD")
    orders = Counter(questions.choice_order(f"rec{n}") for n in range(24000))
    assert len(orders) == 24 and all(850 < count < 1150 for count in orders.values())  # 1000 ± 5 standard deviations
    # Fixed for ever: stored samples would be graded against other letters.
    assert [questions.choice_order(name) for name in ("rec0", "rec1")] == [(2, 3, 1, 0), (2, 0, 1, 3)]


def test_a_programming_problem_is_asked_in_livecodebenchs_words(data_dir: Path) -> None:
    documents = {document["id"]: document for document in problems.livecodebench(str(data_dir))}
    start = (
        "You will be given a question (problem specification) and will generate a correct Python program that matches "
        "the specification and passes all tests.\n\nQuestion: Add {} to a number.\n\n\n"
    )
    assert documents["q7"]["question"] == start.format(7) + (
        "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the "
        "sample inputs). Enclose your code within delimiters as follows.\n```python\n# YOUR CODE HERE\n```\n\n"
    )
    assert documents["q8"]["question"] == start.format(8) + (
        "You will use the following starter code to write the solution to the problem and enclose your code within "
        "delimiters.\n```python\nclass Solution:\n    def add8(self, x: int) -> int:\n        \n```\n\n"
    )


def test_a_programming_problem_keeps_all_its_tests(data_dir: Path) -> None:
    for document in problems.livecodebench(str(data_dir)):
        n, reference = int(document["id"][1:]), document["reference"]
        tests = cases(reference["public"], reference["private"])
        assert [(test.input, test.output) for test in tests] == [("1", str(1 + n)), ("1000", str(1000 + n))]
        assert reference["function"] == ("" if n % 2 else f"add{n}")


def test_the_window_has_both_its_ends_and_nothing_else(data_dir: Path) -> None:
    assert {document["id"] for document in problems.livecodebench(str(data_dir))} == {f"q{n}" for n in range(5, 284)}
    january = problems.livecodebench(str(data_dir), start="2025-01-01", end="2025-02-01")
    dates = {row["question_id"]: row["contest_date"] for row in upstream.livecodebench()}
    assert january and all(dates[document["id"]] >= "2025-01-01" for document in january)
    early = problems.livecodebench(str(data_dir), release="release_v1", start="2023-01-01", end="2026-01-01")
    assert {document["id"] for document in early} == {f"q{n}" for n in range(0, 284, 5)}  # the first file's


# -------------------------------------------------------------------------------------------------- what is not asked


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_question_is_refused(tmp_path: Path, task: str) -> None:
    refused(tmp_path, task, upstream.ROWS[task]()[:-1], rf"has {COUNTS[task]} questions, but {COUNTS[task] - 1} were")


@pytest.mark.parametrize("task", TASKS)
def test_two_questions_with_one_id_are_refused(tmp_path: Path, task: str) -> None:
    rows = upstream.ROWS[task]()
    rows[20][IDS[task]] = rows[21][IDS[task]]
    refused(tmp_path, task, rows, f"the id {rows[21][IDS[task]]} stands for two questions")


@pytest.mark.parametrize("task", TASKS)
def test_a_row_without_its_columns_is_refused(tmp_path: Path, task: str) -> None:
    rows = [
        {("other" if key == IDS[task] else key): cell for key, cell in row.items()} for row in upstream.ROWS[task]()
    ]
    refused(tmp_path, task, rows, f"the column '{IDS[task]}' is missing or empty; is this the right file")


@pytest.mark.parametrize("answer", ["1000", "-1", "\\frac{1}{2}", "12.5", "twelve"])
def test_an_aime_answer_out_of_range_is_refused(tmp_path: Path, answer: str) -> None:
    rows = upstream.aime25()
    rows[4]["answer"] = answer
    refused(tmp_path, "aime25", rows, r"test.jsonl:5: the answer .* of 4 is no integer from 0 to 999")


def test_choices_that_are_the_same_are_refused(tmp_path: Path) -> None:
    rows = upstream.gpqa_diamond()
    rows[3]["Incorrect Answer 2"] = f" {rows[3]['Correct Answer']}"
    refused(tmp_path, "gpqa_diamond", rows, f"two of the four choices of {rows[3]['Record ID']} are the same")


@pytest.mark.parametrize("column", ["Correct Answer", "Incorrect Answer 3", "Question"])
def test_an_empty_choice_is_refused(tmp_path: Path, column: str) -> None:
    rows = upstream.gpqa_diamond()
    rows[3][column] = " "
    refused(tmp_path, "gpqa_diamond", rows, f"the column '{column}' is missing or empty")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "q9 has no tests"),
        ({"public_test_cases": "[]", "private_test_cases": upstream.packed([])}, "q9 has no tests"),
        ({"public_test_cases": "", "private_test_cases": ""}, "'public_test_cases' is missing or empty"),
        ({"public_test_cases": "[1]"}, "the tests of q9 cannot be read"),
        ({"public_test_cases": "[{"}, "the tests of q9 cannot be read"),
        ({"private_test_cases": "!!!!"}, "the tests of q9 cannot be read: they are neither JSON nor base64"),
        ({"private_test_cases": "abcde"}, "the tests of q9 cannot be read: they are neither JSON nor base64"),
        ({"private_test_cases": "AAAA"}, "the tests of q9 cannot be read: they are neither JSON nor base64 of zlib"),
        ({"private_test_cases": upstream.packed("text")}, "does not begin as a list of tests"),
        ({"metadata": "{"}, "the tests of q9 cannot be read"),
        ({"metadata": '{"func_name": "f"}'}, "either the tests of q9 or its metadata"),
        ({"contest_date": "soon"}, "contest_date=soon is no date"),
        ({"question_content": ""}, "'question_content' is missing or empty"),
    ],
)
def test_a_problem_that_cannot_be_graded_is_refused(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    rows = upstream.livecodebench()
    rows[9].update(changes)
    refused(tmp_path, "livecodebench", rows, says)


def test_a_problem_needs_only_one_kind_of_tests(tmp_path: Path) -> None:
    rows = upstream.livecodebench()
    rows[9]["public_test_cases"] = "[]"
    rows[10]["private_test_cases"] = "[]"
    upstream.write(tmp_path, "livecodebench", rows)
    assert len(problems.livecodebench(str(tmp_path))) == 279


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": "2025-03-01"}, "livecodebench_start=2025-03-01 is not before livecodebench_end=2025-02-01"),
        ({"end": "tomorrow"}, "livecodebench_end=tomorrow is no date"),
        ({"start": "2030-01-01", "end": "2031-01-01"}, "no problem from 2030-01-01 to 2031-01-01"),
        ({"release": "v5"}, "livecodebench_release=v5: there is no such release; use one of release_v1"),
        ({"style": "fancy"}, "prompt_style=fancy: there is no such style; use one of plain, tinyr1"),
    ],
)
def test_impossible_options_are_refused(data_dir: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        problems.livecodebench(str(data_dir), **options)


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_file_is_refused_with_the_command_that_gets_it(tmp_path: Path, task: str) -> None:
    with pytest.raises(UserError, match=rf"has no {task}/.*hf download \S+ .*--revision [0-9a-f]{{40}} --local-dir"):
        LOADERS[task](str(tmp_path))


@pytest.mark.parametrize("task", TASKS)
def test_a_damaged_file_is_refused(tmp_path: Path, task: str) -> None:
    upstream.write(tmp_path, task, upstream.ROWS[task]())
    (tmp_path / task / upstream.FILES[task]).write_bytes(b'{"problem": "cut o\xff')
    with pytest.raises(UserError, match=r"cannot be read|is missing or empty|has 198 questions"):
        LOADERS[task](str(tmp_path))


# ------------------------------------------------------------------------------------------------------------ the hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs: a folder's files at any revision, or a refusal."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.refusal, self.asked = folder, "", list[str]()
        super().__init__(("127.0.0.1", 0), HubHandler)


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        repository, resolve, rest = self.path.partition("/resolve/")
        if not resolve:  # the client asks for more than the file
            self.send_error(404)
            return
        self.server.asked.append(self.path)
        revision, _, name = rest.partition("/")
        content = (self.server.folder / name).read_bytes()
        self.send_response(403 if self.server.refusal else 200)
        if self.server.refusal:
            content = b""
            self.send_header("X-Error-Code", self.server.refusal)
            self.send_header("X-Error-Message", f"Access to {repository} is restricted.")
        self.send_header("X-Repo-Commit", revision)
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(data_dir: Path) -> Iterator[Hub]:
    server = Hub(data_dir / "gpqa_diamond")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def without_folder(task: str, home: Path, **environment: str) -> Any:
    """What loading without a folder gives, or its error, in a process with another hub; it reads its address once."""
    code = (
        "import json; from branchmerge.errors import UserError; from branchmerge.evaluation import questions\n"
        f"try: print(json.dumps(questions.{task}()))\n"
        "except UserError as error: print(json.dumps(str(error)))"
    )
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_without_a_folder_the_pinned_file_comes_from_the_hub(hub: Hub, data_dir: Path, tmp_path: Path) -> None:
    found = without_folder("gpqa_diamond", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert found == questions.gpqa_diamond(str(data_dir))
    source = benchmark_files.GPQA
    wanted = f"/datasets/{source.repository}/resolve/{source.revision}/gpqa_diamond.csv"
    assert {path.partition("?")[0] for path in hub.asked} == {wanted}


def test_a_gated_repository_says_how_to_get_access(hub: Hub, tmp_path: Path) -> None:
    hub.refusal = "GatedRepo"
    error = without_folder("gpqa_diamond", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert "accept its terms on https://huggingface.co/datasets/Idavidrein/gpqa, then run `hf auth login`" in error


def test_without_the_hub_it_says_how_to_bring_the_files(tmp_path: Path) -> None:
    error = without_folder("aime25", tmp_path, HF_HUB_OFFLINE="1")
    assert re.search(r"cannot be downloaded .* pass data_dir=<folder>: hf download math-ai/aime25 test.jsonl", error)
    assert "\n" not in error


def test_every_pinned_revision_is_a_commit() -> None:
    for source in (*(benchmark_files.__dict__[name] for name in ("AIME24", "AIME25", "MATH500", "GPQA")),
                   benchmark_files.livecodebench("release_v6")):  # fmt: skip
        assert re.fullmatch(r"[0-9a-f]{40}", source.revision)
    assert benchmark_files.livecodebench("release_v1").files == ("test.jsonl",)
    assert benchmark_files.livecodebench("release_v5").files[-1] == "test5.jsonl"
    assert json.dumps(benchmark_files.livecodebench("release_v5").files).count("jsonl") == 5
