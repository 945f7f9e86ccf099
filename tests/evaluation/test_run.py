"""evaluate() from requests to scores: known answers get exactly the known scores, and nothing is done twice or lost.

The model is a server on the loopback that answers every question as it was told to (tests/serving.py).
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import upstream
from aiohttp import web
from datasets import Dataset
from hydra import compose, initialize_config_dir
from lm_eval.api.task import ConfigurableTask
from serving import Server, completion, serving

from branchmerge import config
from branchmerge.config import EvaluateConfig
from branchmerge.config_checks import typed
from branchmerge.errors import UserError
from branchmerge.evaluation import models, preflight, run, sandbox
from branchmerge.evaluation.backends import openai
from branchmerge.evaluation.benchmark import Benchmark, load_benchmark
from branchmerge.evaluation.graders import Verdict
from branchmerge.evaluation.requests import Request, Response, Sampling
from branchmerge.evaluation.run import evaluate
from branchmerge.machine import cores
from branchmerge.trajectories.demo_teacher import problems
from branchmerge.trajectories.schema import Message

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("math", "code", "science")
QUESTIONS = 6

config.register()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "FIRST_WAIT", 0.02)


def settings(server: Server, outputs: Path, *overrides: str) -> list[str]:
    return ["backend=openai", f"backend.base_urls=[{server.url}]", "backend.model=student", "backend.retries=1",
            f"benchmark.limit={QUESTIONS}", f"outputs={outputs}", "progress=false", *overrides]  # fmt: skip


def composed(*overrides: str) -> EvaluateConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return typed(compose("evaluate", overrides=list(overrides)), EvaluateConfig)


Rule = Callable[[int, int, Any], str | None]
"""From the number of a question, how often it was asked before, and its problem, to what is said; None: an error"""


def told(domain: str, rule: Rule) -> Callable[[dict[str, Any], int], web.Response | dict[str, Any]]:
    """Answers to the questions of a domain."""
    known = {problem.question: (number, problem) for number, problem in enumerate(islice(problems(domain), QUESTIONS))}
    asked: Counter[int] = Counter()

    def answer(body: dict[str, Any], tries: int) -> web.Response | dict[str, Any]:
        number, problem = known[body["messages"][-1]["content"]]
        said = rule(number, asked[number], problem)
        asked[number] += 1
        return web.Response(status=500, text="lost") if said is None else completion(said, tokens=10 + number)

    return answer


def right(number: int, before: int, problem: Any) -> str:
    return str(problem.right.text())


def half(number: int, before: int, problem: Any) -> str:
    """Of the even questions every second sample is right, of the odd ones none."""
    return str((problem.right if number % 2 == 0 and before % 2 == 0 else problem.wrong).text())


def samples_of(outputs: Path, task: str) -> list[dict[str, Any]]:
    path = outputs / "demo" / "scores" / "served" / "student" / "samples" / f"{task}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_other_graders_grade_again_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Server(told("math", right))) as server:
        run = composed(*settings(server, tmp_path, "benchmark.tasks=[demo_math]"))
        values = [evaluate(run)[0].value]
        monkeypatch.setattr("branchmerge.evaluation.benchmark.grade", lambda *_: Verdict(False, "wrong_answer"))
        values.append(evaluate(run)[0].value)
        monkeypatch.setattr("branchmerge.evaluation.run.GRADING", -1)
        values.append(evaluate(run)[0].value)
        assert values == [1.0, 1.0, 0.0]
        assert len(server.bodies) == QUESTIONS


@pytest.mark.parametrize("domain", DOMAINS)
def test_known_samples_get_exactly_the_known_score(tmp_path: Path, domain: str) -> None:
    with serving(Server(told(domain, half))) as server:
        (score,) = evaluate(
            composed(*settings(server, tmp_path, f"benchmark.tasks=[demo_{domain}]", "benchmark.samples=4"))
        )
    means = [0.5 if number % 2 == 0 else 0.0 for number in range(QUESTIONS)]
    assert score.value == sum(means) / QUESTIONS
    assert score.stderr == pytest.approx((sum((m - 0.25) ** 2 for m in means) / QUESTIONS / (QUESTIONS - 1)) ** 0.5)
    assert (score.questions, score.samples, score.missing, score.no_answer) == (QUESTIONS, 4, 0, 0.0)
    assert score.metrics["pass@2"] == pytest.approx(3 * (1 - 1 / 6) / QUESTIONS)
    assert score.metrics["pass@4"] == 0.5
    assert ("maj@4" in score.metrics) == (domain != "code")
    assert score.output_tokens == pytest.approx(10 + (QUESTIONS - 1) / 2)
    assert score.key["sandbox"] is None or domain == "code"
    rows = samples_of(tmp_path, f"demo_{domain}")
    assert sum(row["accuracy"] for row in rows) == 6 and len(rows) == 4 * QUESTIONS
    assert len({row["seed"] for row in rows}) == len(rows)


def test_finished_scores_are_not_asked_for_again_and_overwrite_asks(tmp_path: Path) -> None:
    with serving(Server(told("math", right))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        first = evaluate(composed(*arguments))
        assert repr(evaluate(composed(*arguments))) == repr(first)  # NaN is no error of one sample a question
        assert len(server.bodies) == QUESTIONS
        evaluate(composed(*arguments, "overwrite=true"))
        assert len(server.bodies) == 2 * QUESTIONS


def test_more_samples_reuse_those_that_are_there_and_other_parameters_none(tmp_path: Path) -> None:
    with serving(Server(told("math", right))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        evaluate(composed(*arguments))
        evaluate(composed(*arguments, "benchmark.samples=3"))
        assert len(server.bodies) == 3 * QUESTIONS
        evaluate(composed(*arguments, "benchmark.max_new_tokens=63"))
        assert len(server.bodies) == 4 * QUESTIONS
        evaluate(composed(*arguments, "seed=7"))
        assert len(server.bodies) == 5 * QUESTIONS


def test_another_model_under_a_served_name_is_told_by_its_revision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "note: stored responses of student are used; if another model is served under that name now, set backend.rev"
    with serving(Server(told("math", right))) as server:
        (first,) = evaluate(composed(*settings(server, tmp_path, "benchmark.tasks=[demo_math]")))
        assert first.value == 1.0 and "revision" not in first.key and "note: " not in capsys.readouterr().out
    with serving(Server(told("math", lambda *_: "\\boxed{-1}"))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        (score,) = evaluate(composed(*arguments))
        assert (score.value, len(server.bodies)) == (1.0, 0) and capsys.readouterr().out.count(note) == 1
        evaluate(composed(*arguments, "benchmark.limit=3"))
        assert len(server.bodies) == 0 and capsys.readouterr().out.count(note) == 1
        (score,) = evaluate(composed(*arguments, "backend.revision=second"))
        assert (score.value, len(server.bodies)) == (0.0, QUESTIONS)
        assert (score.key["revision"], note in capsys.readouterr().out) == ("second", False)


def test_reasoning_that_a_template_opened_and_a_server_cut_off_is_no_answer(
    thinking_student: Path, tmp_path: Path
) -> None:
    def cut(body: dict[str, Any], tries: int) -> dict[str, Any]:
        said = answer(body, tries)["choices"][0]["message"]["content"]  # type: ignore[index]
        return completion(said.split("</think>")[-1] + " ... but wait, let me", "length", 64)

    answer = told("math", right)
    with serving(Server(cut)) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]", f"models=[{thinking_student}]")
        (score,) = evaluate(composed(*arguments))
    assert (score.value, score.no_answer, score.metrics["truncated"]) == (0.0, 1.0, 1.0)


def test_a_failed_request_is_an_error_and_no_wrong_answer(tmp_path: Path) -> None:
    def third_fails(number: int, before: int, problem: Any) -> str | None:
        return None if number == 2 else right(number, before, problem)

    with serving(Server(told("math", third_fails))) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]")
        with pytest.raises(UserError, match=r"1 samples could not be generated, the first: demo_math .* answers 500"):
            evaluate(composed(*arguments))
        asked = len(server.bodies)
        (score,) = evaluate(composed(*arguments, "allow_missing=true"))
        assert (score.value, score.questions, score.missing) == (1.0, QUESTIONS - 1, 1)
        assert len(server.bodies) == asked + 2  # the missing one alone, tried twice
    with serving(Server(told("math", right))) as server:
        (score,) = evaluate(composed(*settings(server, tmp_path, "benchmark.tasks=[demo_math]")))
        assert (score.value, score.questions, score.missing) == (1.0, QUESTIONS, 0)
        assert len(server.bodies) == 1


def test_what_is_not_graded_yet_is_left_when_something_is_wrong() -> None:
    begun: list[int] = []

    def slow(number: int) -> None:
        begun.append(number)
        time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt), run._threads() as pool:
        for number in range(100):
            pool.submit(slow, number)
        raise KeyboardInterrupt
    time.sleep(0.5)
    assert len(begun) <= cores()


def test_responses_that_are_there_need_no_more_room(tmp_path: Path) -> None:
    request = Request("t", "q", 0, (Message("user", "x"),), Sampling(max_new_tokens=1 << 40), 0)
    with pytest.raises(UserError, match="1 responses may take"):
        preflight.check_room([request], 0, tmp_path)
    preflight.check_room([request], 16 << 40, tmp_path)


def test_a_model_that_is_named_twice_is_one(tiny_student: Path, tmp_path: Path) -> None:
    named = f"models=[{tiny_student},{tiny_student}/]"
    assert len(models.find(composed(named, f"outputs={tmp_path}"))) == 1


def test_samples_of_a_greedy_task_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_benchmark(composed("benchmark.tasks=[demo_math]", "benchmark.samples=4", f"outputs={tmp_path}"))
    assert "note: demo_math is greedy, so the 4 samples of a question" in capsys.readouterr().out


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 while 9 of 16 samples are on the disk."""

    def slow_after_nine(body: dict[str, Any], tries: int) -> dict[str, Any]:
        if len(server.bodies) > 9:
            time.sleep(0.5)
        return answer(body, tries)  # type: ignore[return-value]

    answer = told("math", right)
    with serving(Server(slow_after_nine)) as server:
        arguments = settings(server, tmp_path, "benchmark.tasks=[demo_math]", "backend.concurrency=1")
        arguments += ["benchmark.limit=4", "benchmark.samples=4"]
        process = subprocess.Popen(
            [sys.executable, "evaluate.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stored = tmp_path / "demo" / "scores" / "served" / "student" / "responses" / "demo_math.jsonl"
        deadline = time.monotonic() + 120
        while not stored.exists() or stored.read_bytes().count(b"\n") < 9:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        there = stored.read_bytes().count(b"\n")
        assert 9 <= there < 16
        assert not (stored.parents[1] / "demo_math.json").exists()
    with serving(Server(told("math", right))) as server:
        again = settings(server, tmp_path, "benchmark.tasks=[demo_math]", "benchmark.limit=4", "benchmark.samples=4")
        (score,) = evaluate(composed(*again))
        assert len(server.bodies) == 16 - there
    assert (score.value, score.questions, score.missing) == (1.0, 4, 0)


def test_a_context_that_is_too_short_is_refused_before_a_model_loads(tiny_student: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_student, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"these weights cannot be loaded")
    arguments = [f"models=[{broken}]", f"outputs={tmp_path}", "benchmark.tasks=[demo_math]", "benchmark.limit=2",
                 "benchmark.max_new_tokens=1000000", "backend.device=cpu"]  # fmt: skip
    with pytest.raises(UserError, match=r"demo_math: a prompt of \d+ tokens and up to 1000000 new ones exceed .* give"):
        evaluate(composed(*arguments))


def lm_eval_task(**more: Any) -> ConfigurableTask:
    docs = Dataset.from_list([{"question": "1 + 1?", "choices": ["1", "2"], "answer": 1, "sum": "2"}])
    config = {"task": "sums", "custom_dataset": lambda **_: {"test": docs}, "test_split": "test",
              "doc_to_text": "{{question}}", "doc_to_target": "{{sum}}"}  # fmt: skip
    return ConfigurableTask(config={**config, **more})


def test_tasks_that_compare_likelihoods_are_refused() -> None:
    task = lm_eval_task(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{answer}}")
    with pytest.raises(UserError, match="sums: compares likelihoods"):
        Benchmark(task, 1, Sampling(8), None)


FILTER = [{"name": "number", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]}]
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("It is 2.", Verdict(True, "", "2")),
        ("<think>\nIs it 3?\n</think>\n\nIt is 2.", Verdict(True, "", "2")),
        ("It is 3.", Verdict(False, "wrong_answer", "3")),
        ("<think>\nIt is 2.", Verdict(False, "no_answer", truncated=True)),
    ],
)
def test_lm_evals_own_tasks_are_graded_by_their_filters_and_metric(said: str, expected: Verdict) -> None:
    task = lm_eval_task(output_type="generate_until", filter_list=FILTER, metric_list=EXACT)
    benchmark = Benchmark(task, 1, Sampling(8), None)
    (request,) = benchmark.requests(42)
    assert request.messages == (Message("user", "1 + 1?"),)
    assert benchmark.grade(request, Response(said, 5, "stop")).verdict == expected
    assert benchmark.grader == "" and benchmark.sandbox_level() is None


def test_a_metric_between_right_and_wrong_is_refused() -> None:
    task = lm_eval_task(
        output_type="generate_until", metric_list=EXACT, process_results=lambda doc, results: {"exact_match": 0.5}
    )
    benchmark = Benchmark(task, 1, Sampling(8), None)
    (request,) = benchmark.requests(42)
    with pytest.raises(UserError, match=r"sums: its metric exact_match gives 0\.5"):
        benchmark.grade(request, Response("2", 5, "stop"))


def test_a_backend_that_is_not_installed_is_told_before_anything_is_asked(tiny_student: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match="vLLM is not installed; pip install"):
        evaluate(composed("backend=vllm", f"models=[{tiny_student}]", f"outputs={tmp_path}"))
    assert not list(tmp_path.rglob("responses"))


def test_servers_need_an_address_and_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give backend\.base_urls=.* and backend\.model="):
        evaluate(composed("backend=openai", f"outputs={tmp_path}"))


def test_the_sandboxs_level_is_the_one_that_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with serving(Server(told("code", right))) as server:
            arguments = settings(server, tmp_path, "benchmark.tasks=[demo_code]")
            (score,) = evaluate(composed(*arguments, "sandbox=unsafe"))
            assert "sandbox level unsafe" in capsys.readouterr().out
            assert (score.value, score.key["sandbox"]) == (1.0, "unsafe")
            with pytest.raises(UserError, match="no sandbox level 'docker'; the levels are auto, "):
                evaluate(composed(*arguments, "sandbox=docker"))
    finally:
        sandbox.use("auto")


@pytest.mark.parametrize(("grader", "correct"), [("strict", True), ("official", False)])
def test_official_verdicts_can_be_asked_for(data_dir: Path, grader: str, correct: bool) -> None:
    """LiveCodeBench has no lines in the sys.stdin that it gives to a program."""
    settings = ["benchmark.tasks=[livecodebench]", f"benchmark.data_dir={data_dir}"]
    (benchmark,) = load_benchmark(composed(*settings, f"benchmark.livecodebench_grader={grader}"))
    assert benchmark.grader == {"strict": "livecodebench", "official": "livecodebench_official"}[grader]
    assert benchmark.sandbox_level() == sandbox.shared().level
    request = next(request for request in benchmark.requests(42) if int(request.question[1:]) % 2)
    number = int(request.question[1:])
    said = f"```python\nimport sys\nfor line in sys.stdin:\n    print(int(line) + {number})\n```"
    assert benchmark.grade(request, Response(said, 9, "stop")).verdict.correct is correct
    usual = f"```python\n{upstream.solution(number)}```"
    assert benchmark.grade(request, Response(usual, 9, "stop")).verdict.correct


ASKED = 3
"""Questions of each published benchmark"""


def right_answer(task: str, doc: Mapping[str, Any]) -> str:
    if task != "livecodebench":
        return f"<think>\n?\n</think>\n\n\\boxed{{{doc['reference']['answer']}}}"
    return f"```python\n{upstream.solution(int(doc['id'][1:]))}```"


@pytest.mark.parametrize("task", sorted(upstream.ROWS))
def test_the_papers_benchmarks_score_known_samples_exactly(tmp_path: Path, data_dir: Path, task: str) -> None:
    """Of k samples the first k - 1 of each question are right."""
    overrides = [f"benchmark.tasks=[{task}]", f"benchmark.data_dir={data_dir}", f"benchmark.limit={ASKED}"]
    (benchmark,) = load_benchmark(composed(*overrides))
    known = {benchmark.prompts[question][-1].content: doc for question, doc in benchmark.docs.items()}
    asked: Counter[str] = Counter()
    k = benchmark.samples
    assert k == {"aime24": 16, "aime25": 16}.get(task, 4) and benchmark.sampling == Sampling(32768, 0.6, 0.95)

    def answer(body: dict[str, Any], tries: int) -> dict[str, Any]:
        question = body["messages"][-1]["content"]
        asked[question] += 1
        wrong = "\\boxed{7777}" if task != "livecodebench" else "```python\nprint(0)\n```"
        return completion(right_answer(task, known[question]) if asked[question] < k else wrong)

    with serving(Server(answer)) as server:
        (score,) = evaluate(composed(*settings(server, tmp_path, *overrides)))
    assert score.value == pytest.approx((k - 1) / k)
    assert (score.questions, score.samples, score.stderr) == (ASKED, k, 0.0)
    assert score.metrics["pass@2"] == 1.0 and score.metrics["truncated"] == 0.0
    assert score.metrics.get(f"maj@{k}", 1.0) == 1.0
    assert score.no_answer == (1 / k if task == "gpqa_diamond" else 0.0)  # 7777 is no letter
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in server.bodies} == {(0.6, 0.95, 32768)}
    assert score.metrics.get("math_verify", score.value) == pytest.approx(score.value)
