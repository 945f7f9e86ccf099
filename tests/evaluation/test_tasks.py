"""The tasks through lm-eval: what a model is asked, and that known answers give exactly the known scores."""

import json
import math
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from branchmerge import config
from branchmerge.config import BackendConfig, EvaluateConfig
from branchmerge.data.template import PREFILL, tokenise
from branchmerge.errors import UserError
from branchmerge.evaluation import backends, store
from branchmerge.evaluation.models import Model
from branchmerge.evaluation.run import TASKS, _load_tasks, _sample, _score
from branchmerge.evaluation.stats import mean_and_stderr
from branchmerge.student.backbone import load_tokenizer
from branchmerge.study import parent_of
from branchmerge.trajectories import sources
from branchmerge.trajectories.demo_teacher import problems
from branchmerge.trajectories.schema import Message, Reference, Trajectory

CONF = Path(__file__).resolve().parents[2] / "conf"
DOMAINS = ("math", "code", "science")
OWN = sorted(path.stem for path in TASKS.glob("*.yaml"))
BACKEND = BackendConfig(batch_size=4, dtype="float32", device="cpu")
QUESTIONS = 10

GSM8K = {"question": "Ann packs {} boxes of 4 pens. How many pens?", "answer": "{0}*4=<<{0}*4={1}>>{1}.\n#### {1}"}
MBPP = {"text": "Write a function to add {}.", "code": "def inc(x):\n    return x + {}", "test_setup_code": ""}
MMLU = {"question": "What is the unit of force, number {}?", "choices": ["J", "W", "N", "Pa"], "answer": 2}

config.register()


def composed(*overrides: str) -> EvaluateConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config.typed(compose("evaluate", overrides=list(overrides)), EvaluateConfig)


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
    return _load_tasks(composed(f"benchmark.tasks=[{','.join(OWN)}]", f"study.data_dir={raw_rows}"))


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


class Watched(backends.Transformers):
    """The real backend, which remembers the token ids that its model is fed, padding taken away."""

    fed: list[list[int]]

    def _model_generate(self, context: torch.Tensor, *args: Any, attention_mask: torch.Tensor, **more: Any) -> Any:
        self.fed = [row[kept.bool()].tolist() for row, kept in zip(context, attention_mask, strict=True)]
        return super()._model_generate(context, *args, attention_mask=attention_mask, **more)


def ask(task: Any, lm: Any, limit: int = QUESTIONS) -> list[dict[str, Any]]:
    """Generate and grade through lm-eval; returns the samples that evaluate.py stores."""
    results = simple_evaluate(
        model=lm, tasks=[task], limit=limit, apply_chat_template=True, bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False), confirm_run_unsafe_code=True,
    )  # fmt: skip
    assert results is not None
    samples = [_sample(raw) for raw in results["samples"][task.config.task]]
    means = results["results"][task.config.task]
    for metric in ("accuracy", "no_answer"):
        assert means[f"{metric},none"] == pytest.approx(mean_and_stderr([sample[metric] for sample in samples])[0])
    return samples


def scripted(domain: str, student: Path, right: int, wrong: int) -> Scripted:
    """Right answers to the first questions, then wrong ones, then four in which no answer can be found."""
    lost = ["", "I don't know.", f"{PREFILL}it may be \\boxed{{A}} or ```python\n1\n```", "\\boxed{"]
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


def test_the_score_and_its_samples_are_stored(tiny_student: Path, tasks: dict[str, Any], tmp_path: Path) -> None:
    cfg = composed(f"benchmark.limit={QUESTIONS}", "backend.device=cpu", "backend.dtype=float32")
    model = Model("some/model", tiny_student, parent_of(tiny_student))
    lm = scripted("math", tiny_student, right=5, wrong=1)
    found = _score(cfg, model, tasks["demo_math"], lm, tmp_path)
    assert (found.questions, found.value, found.no_answer) == (QUESTIONS, pytest.approx(0.5), pytest.approx(0.4))
    assert found.stderr == pytest.approx(math.sqrt(0.5 * 0.5 / (QUESTIONS - 1)))
    assert store.read(tmp_path, "demo_math", found.key) == found
    samples = [json.loads(line) for line in (tmp_path / "samples" / "demo_math.jsonl").read_text().splitlines()]
    lengths = [len(lm.tokenizer(response, add_special_tokens=False)["input_ids"]) for response in lm.answers.values()]
    assert [sample["output_tokens"] for sample in samples] == lengths
    assert found.output_tokens == pytest.approx(sum(lengths) / QUESTIONS)


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
        _load_tasks(composed("benchmark.tasks=[demo_math,demo_maths]"))


# ------------------------------------------------------------------------------------------- what a real model is fed


def edited(student: Path, folder: Path, **changes: str) -> Path:
    """A copy whose tokenizer differs: `bos` (a token that it puts in front), or its `chat_template`."""
    shutil.copytree(student, folder)
    tokenizer = load_tokenizer(folder)
    if "bos" in changes:
        bos = changes["bos"]
        tokenizer.bos_token = bos
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = changes.get("front", "") + template + changes.get("end", "")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["as it is", "bos in the template", "bos by the tokenizer only", "thinking"])
def student(request: pytest.FixtureRequest, tiny_student: Path, tmp_path: Path) -> Iterator[Path]:
    """The tiny student with tokenizers of several habits."""
    changes = {
        "as it is": {},
        "bos in the template": {"bos": "<|endoftext|>", "front": "{{ bos_token }}"},
        "bos by the tokenizer only": {"bos": "<|endoftext|>"},
        "thinking": {"end": "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"},
    }
    yield edited(tiny_student, tmp_path / "student", **changes[request.param])


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_model_is_fed_the_ids_it_was_trained_on(student: Path, tasks: dict[str, Any], domain: str) -> None:
    lm = Watched(pretrained=str(student), dtype="float32", device="cpu", batch_size=1)
    (sample,) = ask(tasks[f"demo_{domain}"], lm, limit=1)
    question = next(iter(tasks[f"demo_{domain}"].eval_docs))["question"]
    row = Trajectory("x", domain, (Message("user", question), Message("assistant", f"{PREFILL}hm\n</think>\n\n1")))
    document = tokenise(load_tokenizer(student), row)
    assert lm.fed == [list(document.tokens[: document.prompt_len])]
    assert question in sample["prompt"]


def requests(lm: backends.Transformers, *questions: str) -> list[Instance]:
    prompts = [lm.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    kwargs = {"until": [], "do_sample": False, "max_gen_toks": 5}
    return [Instance("generate_until", {}, (prompt, kwargs), number) for number, prompt in enumerate(prompts)]


def test_responses_begin_with_the_reasoning_that_the_template_opened(tiny_student: Path, tmp_path: Path) -> None:
    thinking = edited(tiny_student, tmp_path / "thinking", end="{{ '<think>\\n' }}")
    questions = ["What is 12 * 7?", "A much longer question, for another length of the prompt.", "?"]
    opened, bare = (
        lm.generate_until(requests(lm, *questions))
        for lm in (backends.load(BACKEND, folder) for folder in (thinking, tiny_student))
    )
    assert all(response.startswith(PREFILL) for response in opened)
    assert not any(response.startswith(PREFILL) for response in bare)


def test_a_response_cut_off_in_opened_reasoning_is_no_answer(
    tiny_student: Path, tasks: dict[str, Any], tmp_path: Path
) -> None:
    thinking = edited(tiny_student, tmp_path / "thinking", end="{{ '<think>\\n' }}")
    lm = backends.load(BACKEND, thinking)
    samples = ask(tasks["demo_math"], lm, limit=3)
    assert all(sample["response"].startswith(PREFILL) for sample in samples)
    assert [(sample["accuracy"], sample["no_answer"]) for sample in samples] == [(0.0, 1.0)] * 3


@pytest.mark.parametrize("name", OWN)
def test_a_box_inside_opened_reasoning_is_no_answer(tasks: dict[str, Any], name: str) -> None:
    doc = next(iter(tasks[name].eval_docs))
    response = f"{PREFILL}\\boxed{{{doc['reference'].get('answer')}}}"
    assert tasks[name].process_results(doc, [response]) == {"accuracy": 0.0, "no_answer": 1.0}


def test_a_batch_of_prompts_of_several_lengths_says_the_same_as_one_by_one(tiny_student: Path) -> None:
    questions = ["What is 12 * 7?", "A much longer question, for another length of the prompt.", "?"]
    said = []
    for batch_size in (1, 3):
        lm = backends.load(BackendConfig(batch_size=batch_size, dtype="float32", device="cpu"), tiny_student)
        said.append(lm.generate_until(requests(lm, *questions)))
    assert said[0] == said[1]
