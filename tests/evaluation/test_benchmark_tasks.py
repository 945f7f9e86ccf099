"""The published benchmarks through stock lm-eval: known answers give exactly the known metrics.

The questions are made up (tests/upstream.py), in the formats and numbers of the real ones.
"""

from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any

import pytest
import upstream
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from branchmerge.errors import UserError
from branchmerge.evaluation import prompts
from branchmerge.evaluation.graders import GRADER_TIMEOUT, NO_ANSWER, WRONG_ANSWER, Verdict, grade, votes
from branchmerge.evaluation.prompts import system_prompt
from branchmerge.evaluation.tasks import grading
from branchmerge.trajectories.schema import Reference

TASKS = Path(grading.__file__).parent
SAMPLES = {"aime24": 16, "aime25": 16, "gpqa_diamond": 4, "livecodebench": 4, "math500": 4}
NAMES = sorted(SAMPLES)
Doc = dict[str, Any]


def manager(data_dir: Path, **metadata: str) -> TaskManager:
    metadata = {"data_dir": str(data_dir), **metadata}
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


@pytest.fixture(scope="module")
def tasks(data_dir: Path) -> dict[str, Any]:
    return dict(manager(data_dir).load(NAMES)["tasks"])


class Scripted(LM):
    """A model that answers each time a question is asked what it was told to; with no answer left, it fails."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        super().__init__()
        self.answers = {question: list(given) for question, given in answers.items()}

    @property
    def tokenizer_name(self) -> str:
        return "scripted"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        (turn,) = chat_history
        assert turn["role"] == "user"
        return turn["content"]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.answers[request.args[0]].pop(0) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def run(name: str, answers: dict[str, list[str]], tasks: TaskManager, limit: float | None = None) -> dict[str, Any]:
    """Ask through stock lm-eval, all samples; returns its results."""
    lm = Scripted(answers)
    results = simple_evaluate(
        model=lm, tasks=[name], limit=limit, apply_chat_template=True, bootstrap_iters=0, task_manager=tasks,
        confirm_run_unsafe_code=True,
    )  # fmt: skip
    assert results is not None
    assert not any(lm.answers.values())  # every sample was asked for
    return dict(results)


def right(doc: Doc) -> str:
    """A right response, in the form that its grader wants."""
    reference = doc["reference"]
    if reference["grader"] == "livecodebench":
        return f"<think>hm</think>So:\n```python\n{upstream.solution(int(doc['id'][1:]))}```\n"
    return f"<think>\\boxed{{wrong}}</think>It is \\boxed{{{reference['answer']}}}."


def wrong(doc: Doc) -> str:
    """A wrong response, the same each time."""
    reference = doc["reference"]
    other = {
        "integer": lambda: str(int(reference["answer"]) + 1),
        "choice": lambda: "ABCD"["ABCD".index(reference["answer"]) - 1],
        "math": lambda: reference["answer"] + "+1",
        # Passes the public test and fails the private one.
        "livecodebench": lambda: upstream.solution(int(doc["id"][1:]), wrong=1),
    }[reference["grader"]]()
    if reference["grader"] == "livecodebench":
        return f"<think>hm</think>\n```python\n{other}```"
    return f"{other}</think>\\boxed{{{other}}}"


def lost(doc: Doc) -> str:
    return f"<think>{right(doc)}</think>I don't know."


def truncated(doc: Doc) -> str:
    return f"<think>{right(doc).partition('</think>')[2]}"


def five_questions(task: Any, k: int) -> dict[str, list[str]]:
    """k samples of each: all right; half right, half wrong; all wrong; a quarter right, the others lost; truncated."""
    docs = list(task.eval_docs)[:5]
    given: list[list[Callable[[Doc], str]]] = [
        [right] * k, [right, wrong] * (k // 2), [wrong] * k, [lost, lost, right, lost] * (k // 4), [truncated] * k,
    ]  # fmt: skip
    return {doc["question"]: [say(doc) for say in says] for doc, says in zip(docs, given, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_known_answers_get_exactly_the_known_metrics(data_dir: Path, tasks: dict[str, Any], name: str) -> None:
    k = SAMPLES[name]
    results = run(name, five_questions(tasks[name], k), manager(data_dir), limit=5)["results"][name]
    found = {key.removesuffix(",none"): value for key, value in results.items() if key.endswith(",none")}
    found = {key: value for key, value in found.items() if "stderr" not in key}
    expected = {"accuracy": (1 + 0.5 + 0.25) / 5, "no_answer": (0.75 + 1) / 5, "truncated": 1 / 5}
    for n in (2, 4, 8, 16):
        if n <= k:
            half, most = (1 - comb(failures, n) / comb(k, n) for failures in (k // 2, 3 * k // 4))
            expected[f"pass@{n}"] = (1 + half + most) / 5
    if name != "livecodebench":
        expected[f"maj@{k}"] = (1 + 0.5 + 0 + 1 + 0) / 5
    if name.startswith("aime"):
        expected["math_verify"] = expected["accuracy"]
    assert found == pytest.approx(expected)


def test_an_oracle_answers_all_of_gpqa_and_the_letter_a_a_quarter(data_dir: Path, tasks: dict[str, Any]) -> None:
    docs = list(tasks["gpqa_diamond"].eval_docs)
    accuracy = {}
    for name, say in (("oracle", right), ("a", lambda doc: "The answer is (A).")):
        answers = {doc["question"]: [say(doc)] * 4 for doc in docs}
        found = run("gpqa_diamond", answers, manager(data_dir))["results"]["gpqa_diamond"]
        assert (found["sample_len"], found["no_answer,none"]) == (198, 0)
        accuracy[name] = found["accuracy,none"]
    assert accuracy["oracle"] == 1
    assert 0.18 < accuracy["a"] < 0.32


def test_an_oracle_is_right_on_every_question_of_mathematics(tasks: dict[str, Any]) -> None:
    for name in ("aime24", "aime25", "math500"):
        for doc in tasks[name].eval_docs:
            assert tasks[name].process_results(doc, [right(doc)])["accuracy"] == 1


def test_the_group_counts_each_benchmark_once_whatever_its_size(data_dir: Path, tasks: dict[str, Any]) -> None:
    answers, asked = {}, {"aime24": 1, "livecodebench": 3, "gpqa_diamond": 2}  # one in a hundred, rounded up
    for name, count in asked.items():
        for number, doc in enumerate(list(tasks[name].eval_docs)[:count]):
            answers[doc["question"]] = [(lost if number else right)(doc)] * SAMPLES[name]
    results = run("r1", answers, manager(data_dir), limit=0.01)
    assert set(results["group_subtasks"]["r1"]) == set(asked)
    assert results["results"]["r1"]["accuracy,none"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_asked_as_they_stand(tasks: dict[str, Any], name: str) -> None:
    assert all(tasks[name].doc_to_text(doc) == doc["question"] for doc in tasks[name].eval_docs)


@pytest.mark.parametrize("name", NAMES)
def test_sampling_follows_the_protocol(tasks: dict[str, Any], name: str) -> None:
    assert tasks[name].config.repeats == SAMPLES[name]
    assert tasks[name].config.generation_kwargs == {
        "until": [], "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_gen_toks": 32768,
    }  # fmt: skip


def test_top_k_is_off_in_transformers(tiny_student: Path, tasks: dict[str, Any]) -> None:
    lm = HFLM(pretrained=str(tiny_student), device="cpu", dtype="float32", batch_size=400)
    distinct = {}
    for top_k in (tasks["aime24"].config.generation_kwargs["top_k"], 50):
        # So hot that all of the 512 tokens are about as probable.
        kwargs = {**tasks["aime24"].config.generation_kwargs, "temperature": 50.0, "max_gen_toks": 1, "top_k": top_k}
        asked = [Instance("generate_until", {}, ("What?", kwargs), n) for n in range(400)]
        distinct[top_k] = len(set(lm.generate_until(asked, disable_tqdm=True)))
    assert distinct[50] <= 50 < distinct[0]


# ------------------------------------------------------------------------------------------------------------- options


def test_the_prompts_style_is_an_option_of_the_task(data_dir: Path, tasks: dict[str, Any]) -> None:
    styled = dict(manager(data_dir, prompt_style="tinyr1").load(NAMES)["tasks"])
    for name in NAMES:
        plain, tinyr1 = (next(iter(loaded[name].eval_docs)) for loaded in (tasks, styled))
        assert plain["id"] == tinyr1["id"] and plain["reference"] == tinyr1["reference"]
        assert (plain["question"] == tinyr1["question"]) is (name == "livecodebench")
    with pytest.raises(UserError, match="prompt_style=fancy: there is no such style"):
        manager(data_dir, prompt_style="fancy").load(["aime24"])


def test_the_window_is_an_option_of_the_task(data_dir: Path) -> None:
    options = {"livecodebench_start": "2025-01-01", "livecodebench_end": "2025-02-01"}
    task = manager(data_dir, **options).load(["livecodebench"])["tasks"]["livecodebench"]
    dates = {row["question_id"]: row["contest_date"] for row in upstream.livecodebench()}
    expected = {name for name, date in dates.items() if "2025-01-01" <= date <= "2025-02-01T00:00:00"}
    assert {doc["id"] for doc in task.eval_docs} == expected and len(expected) > 10


def test_a_missing_folder_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no aime24/aime_2024_problems\.parquet; get it by: hf download"):
        manager(tmp_path).load(["aime24"])


def test_system_prompts_are_the_authors() -> None:
    assert [system_prompt(name, "plain") for name in (*NAMES, "demo_math")] == [None] * 6
    mathematics = "Please reason step by step, and put your final answer within \\boxed{}."
    assert {system_prompt(name, "tinyr1") for name in ("aime24", "aime25", "math500")} == {mathematics}
    assert system_prompt("gpqa_diamond", "tinyr1") == (
        "You are a helpful and harmless assistant. You should think step-by-step."
    )
    code = system_prompt("livecodebench", "tinyr1")
    assert code is not None and code.startswith("A conversation between User and Assistant. The user asks a question,")
    assert code.endswith("<think> reasoning process here </think> <answer> answer here </answer>.")
    with pytest.raises(UserError, match="prompt_style=r1: there is no such style; use one of plain, tinyr1"):
        system_prompt("aime24", "r1")
    with pytest.raises(UserError, match="no system prompt for the task ifeval, only for aime24"):
        system_prompt("ifeval", "tinyr1")


def test_every_task_has_its_prompts() -> None:
    assert sorted(prompts.DOMAINS) == NAMES


# ------------------------------------------------------------------------------------------------------------- grading

AIME = Reference("integer", answer="204")


@pytest.mark.parametrize(
    ("response", "correct", "reason", "answer", "by_math_verify"),
    [
        ("\\boxed{204}", True, "", "204", 1.0),
        ("\\boxed{0204}", True, "", "204", 1.0),
        ("\\boxed{\\text{204}}", True, "", "204", 1.0),
        ("\\boxed{204.0}", True, "", "204", 1.0),
        ("\\boxed{n = 204}", True, "", "204", 1.0),
        ("The answer is 204.", True, "", "204", 0.0),
        ("\\boxed{204}, no: \\boxed{205}", False, WRONG_ANSWER, "205", 0.0),
        ("\\boxed{200+4}", False, WRONG_ANSWER, "200+4", 1.0),
        ("\\boxed{}", False, NO_ANSWER, "", 0.0),
        ("204", False, NO_ANSWER, "", 0.0),
        ("", False, NO_ANSWER, "", 0.0),
    ],
)
def test_integers(response: str, correct: bool, reason: str, answer: str, by_math_verify: float) -> None:
    expected = Verdict(correct, reason, answer, secondary={"math_verify": by_math_verify})
    assert grade(response, AIME) == expected
    assert grade(f"<think>\\boxed{{1}}</think>{response}", AIME) == expected


def test_reasoning_without_an_end_is_truncated_for_every_grader() -> None:
    for reference in (
        AIME,
        Reference("math", "204"),
        Reference("choice", "B"),
        Reference("livecodebench", public="[]"),
    ):
        verdict = grade("<think>\\boxed{204} \\boxed{B}\n```python\n1\n```\n", reference)
        assert (verdict.correct, verdict.reason, verdict.truncated) == (False, NO_ANSWER, True)
        assert not grade("</think>no", reference).truncated


@pytest.mark.parametrize(
    ("program", "correct", "reason"),
    [
        (upstream.solution(7), True, ""),
        (upstream.solution(7, wrong=1), False, WRONG_ANSWER),
        ("print(8)\nprint(1007)", False, WRONG_ANSWER),
        ("raise ValueError", False, "crashed"),
    ],
)
def test_programs_run_against_public_and_private_tests(
    tasks: dict[str, Any], program: str, correct: bool, reason: str
) -> None:
    doc = next(doc for doc in tasks["livecodebench"].eval_docs if doc["id"] == "q7")
    verdict = grade(
        f"```python\nprint(0)\n```\nBetter:\n```python\n{program}\n```\n", Reference.parse(doc["reference"])
    )
    assert (verdict.correct, verdict.reason, verdict.answer.strip()) == (correct, reason, program.strip())


def test_tests_that_cannot_be_read_are_an_error_and_no_verdict() -> None:
    reference = Reference("livecodebench", public="[]", private=upstream.packed("text"))
    with pytest.raises(ValueError, match="private tests"):
        grade("```python\n1\n```\n", reference)


def metrics(says: Sequence[str], reference: dict[str, str]) -> dict[str, float]:
    return grading.grade_responses({"id": "x", "reference": reference}, says)


def test_one_response_and_lists_of_responses_are_taken() -> None:
    reference = {"grader": "choice", "answer": "B"}
    one = {"accuracy": 1.0, "no_answer": 0.0, "truncated": 0.0}
    assert metrics(["\\boxed{B}"], reference) == one
    assert grading.grade_responses({"id": "x", "reference": reference}, [["\\boxed{B}"]]) == one
    two = metrics(["\\boxed{B}", "\\boxed{C}"], reference)
    assert two == {"accuracy": 0.5, "no_answer": 0.0, "truncated": 0.0, "pass@2": 1.0, "maj@2": 0.5}
    assert grading.grade_responses({"id": "x", "reference": reference}, [["\\boxed{B}", "\\boxed{C}"]]) == two
    assert {key for key in metrics(["\\boxed{B}"] * 6, reference) if "@" in key} == {
        "pass@2",
        "pass@4",
        "pass@6",
        "maj@6",
    }
    with pytest.raises(ValueError, match="the question x has no response"):
        grading.grade_responses({"id": "x", "reference": reference}, [[]])


def test_right_answers_vote_together_however_they_are_written() -> None:
    says = ["\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "\\boxed{1/2}", "\\boxed{3}", "\\boxed{ 3 }"]
    found = metrics(says, {"grader": "math", "answer": "\\frac12"})
    assert found["maj@5"] == 1 and found["accuracy"] == pytest.approx(3 / 5)
    assert metrics(says, {"grader": "math", "answer": "3"})["maj@5"] == 0
    assert metrics(says[:3] + ["\\boxed{0.5}"] * 2, {"grader": "math", "answer": "3"})["maj@5"] == 0


def test_wrong_answers_vote_together_only_if_they_are_equal() -> None:
    one = Reference("math", answer="7")
    verdicts = [grade(f"\\boxed{{{text}}}", one) for text in ("0.5", "7", "\\frac12", "3", "1/2", "7.0", "2+1", "x")]
    half, right, *others = votes(verdicts, "math")
    assert right is True and half == "0.5"
    assert others == [half, "3", half, True, "3", "x"]
    assert votes(verdicts, "integer")[2] == "\\frac12"
    assert votes([Verdict(False, GRADER_TIMEOUT, "9^9"), Verdict(False, NO_ANSWER)], "math") == ["9^9", None]


def test_the_reason_of_an_endless_comparison_is_no_missing_answer() -> None:
    assert Verdict(False, GRADER_TIMEOUT, "9^9").vote == "9^9"
    assert Verdict(False, NO_ANSWER).vote is None
