"""The tasks through lm-eval: what a model is asked, and that known answers give exactly the known scores."""

import json
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from branchmerge import config
from branchmerge.config import EvaluateConfig
from branchmerge.config_checks import typed
from branchmerge.errors import UserError
from branchmerge.evaluation.benchmark import TASKS, load_benchmark
from branchmerge.student.backbone import load_tokenizer
from branchmerge.trajectories import sources
from branchmerge.trajectories.demo_teacher import problems
from branchmerge.trajectories.schema import Reference

CONF = Path(__file__).resolve().parents[2] / "conf"
DOMAINS = ("math", "code", "science")
OWN = sorted(path.stem for path in TASKS.glob("*.yaml") if path.stem.startswith(("demo_", "real_")))
QUESTIONS = 10

GSM8K = {"question": "Ann packs {} boxes of 4 pens. How many pens?", "answer": "{0}*4=<<{0}*4={1}>>{1}.\n#### {1}"}
MBPP = {"text": "Write a function to add {}.", "code": "def inc(x):\n    return x + {}", "test_setup_code": ""}
MMLU = {"question": "What is the unit of force, number {}?", "choices": ["J", "W", "N", "Pa"], "answer": 2}

config.register()


def composed(*overrides: str) -> EvaluateConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("evaluate", overrides=list(overrides)), EvaluateConfig)


@pytest.fixture(scope="module")
def raw_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the upstream formats, 30 rows each, under the names that the real tasks read."""
    folder = tmp_path_factory.mktemp("rows")
    numbers = range(1, 31)
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k_test": [
            {"question": GSM8K["question"].format(n), "answer": GSM8K["answer"].format(n, 4 * n)} for n in numbers
        ],
        "mbpp": [
            {
                "text": MBPP["text"].format(n),
                "code": MBPP["code"].format(n),
                "test_list": [f"assert inc(1) == {n + 1}"],
                "test_setup_code": "import math" if n % 2 else "",
            }
            for n in numbers
        ],
        "mmlu_stem": [{**MMLU, "question": str(MMLU["question"]).format(n)} for n in numbers],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


@pytest.fixture(scope="module")
def tasks(raw_rows: Path) -> dict[str, Any]:
    """All tasks of branchmerge; lm-eval needs seconds to look through its own."""
    found = load_benchmark(composed(f"benchmark.tasks=[{','.join(OWN)}]", f"study.data_dir={raw_rows}"))
    return {benchmark.name: benchmark.task for benchmark in found}


class Scripted(LM):
    """A model that answers each question as it was told to."""

    def __init__(self, answers: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.answers = answers
        self.tokenizer = tokenizer

    @property
    def tokenizer_name(self) -> str:
        return "scripted"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        (turn,) = chat_history
        assert turn["role"] == "user" and add_generation_prompt
        return turn["content"]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def ask(task: Any, lm: Any, limit: int = QUESTIONS) -> list[dict[str, Any]]:
    """Generate and grade through the stock lm-eval."""
    results = simple_evaluate(
        model=lm, tasks=[task], limit=limit, apply_chat_template=True, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False), confirm_run_unsafe_code=True,
    )  # fmt: skip
    assert results is not None
    samples = [{**raw, "response": raw["resps"][0][0]} for raw in results["samples"][task.config.task]]
    means = results["results"][task.config.task]
    for metric in ("accuracy", "no_answer"):
        assert means[f"{metric},none"] == pytest.approx(fmean(sample[metric] for sample in samples))
    return samples


def scripted(domain: str, student: Path, right: int, wrong: int) -> Scripted:
    """Right answers to the first questions, then wrong ones, then four in which no answer can be found."""
    lost = ["", "I don't know.", "<think>\nit may be \\boxed{A} or ```python\n1\n```", "\\boxed{"]
    answers = {}
    for number, problem in enumerate(islice(problems(domain), QUESTIONS)):
        if number < right:
            answers[problem.question] = problem.right.text()
        elif number < right + wrong:
            answers[problem.question] = problem.wrong.text()
        else:
            answers[problem.question] = lost[number - right - wrong]
    return Scripted(answers, load_tokenizer(student))


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize(("right", "wrong"), [(5, 1), (0, 6), (6, 0)])
def test_known_answers_get_exactly_the_known_verdicts(
    tiny_student: Path, tasks: dict[str, Any], domain: str, right: int, wrong: int
) -> None:
    lm = scripted(domain, tiny_student, right, wrong)
    samples = ask(tasks[f"demo_{domain}"], lm)
    assert [sample["accuracy"] for sample in samples] == [1.0] * right + [0.0] * (QUESTIONS - right)
    assert [sample["no_answer"] for sample in samples] == [0.0] * (right + wrong) + [1.0] * 4
    assert [sample["response"] for sample in samples] == list(lm.answers.values())


@pytest.mark.parametrize("name", OWN)
def test_every_tasks_references_parse(tasks: dict[str, Any], name: str) -> None:
    docs = list(tasks[name].eval_docs)
    assert docs
    graders = {Reference.parse(doc["reference"]).grader for doc in docs}
    assert graders == {{"math": "math", "code": "code", "science": "choice"}[name.split("_")[1]]}


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_demos_tasks_ask_their_whole_split(tasks: dict[str, Any], domain: str) -> None:
    test, dev = (list(tasks[name].eval_docs) for name in (f"demo_{domain}", f"demo_{domain}_dev"))
    assert (len(test), len(dev)) == (100, 60)
    assert {doc["question"] for doc in test} & {doc["question"] for doc in dev} == set()


@pytest.mark.parametrize("name", OWN)
def test_questions_are_asked_as_they_stand(tasks: dict[str, Any], name: str) -> None:
    for doc in tasks[name].eval_docs:
        assert tasks[name].doc_to_text(doc) == doc["question"]


@pytest.mark.parametrize("name", OWN)
def test_every_task_decodes_greedily_until_the_model_stops(tasks: dict[str, Any], name: str) -> None:
    kwargs = tasks[name].config.generation_kwargs
    assert kwargs["do_sample"] is False and not kwargs["until"] and kwargs["max_gen_toks"] >= 64


@pytest.mark.parametrize(
    ("name", "file", "fmt", "split"),
    [
        ("real_math", "gsm8k_test", "gsm8k", "all"),
        ("real_code", "mbpp", "mbpp", "test"),
        ("real_science", "mmlu_stem", "mmlu", "test"),
    ],
)
def test_real_tasks_ask_the_held_out_rows(
    tasks: dict[str, Any], raw_rows: Path, name: str, file: str, fmt: str, split: str
) -> None:
    path = str(raw_rows / f"{file}.jsonl")
    rows = sources.read(config.SourceConfig(path=path, format=fmt, split=split))
    assert [(doc["id"], doc["question"]) for doc in tasks[name].eval_docs] == [(row.id, row.question) for row in rows]
    if split == "test":
        learned = sources.read(config.SourceConfig(path=path, format=fmt, split="train"))
        assert len(learned) + len(rows) == 30
        assert {row.question for row in learned} & {row.question for row in rows} == set()


@pytest.mark.parametrize(("name", "file", "fmt"), [("real_code", "mbpp", "mbpp"), ("real_math", "gsm8k_test", "gsm8k")])
def test_upstream_solutions_are_right_in_the_real_tasks(
    tiny_student: Path, tasks: dict[str, Any], raw_rows: Path, name: str, file: str, fmt: str
) -> None:
    rows = sources.read(config.SourceConfig(path=str(raw_rows / f"{file}.jsonl"), format=fmt))
    lm = Scripted({row.question: row.response for row in rows}, load_tokenizer(tiny_student))
    assert {sample["accuracy"] for sample in ask(tasks[name], lm)} == {1.0}


def test_an_unknown_task_is_refused_with_the_own_ones() -> None:
    with pytest.raises(UserError, match=r"lm-eval knows no task demo_maths; .* demo_code, .* real_science"):
        load_benchmark(composed("benchmark.tasks=[demo_math,demo_maths]"))


@pytest.mark.parametrize("name", OWN)
def test_a_box_inside_opened_reasoning_is_no_answer(tasks: dict[str, Any], name: str) -> None:
    doc = next(iter(tasks[name].eval_docs))
    response = f"<think>\n\\boxed{{{doc['reference'].get('answer')}}}"
    assert tasks[name].process_results(doc, [response]) == {"accuracy": 0.0, "no_answer": 1.0}
