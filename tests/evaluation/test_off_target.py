"""Probes that lm-eval brings: graded by its own code, on what follows the reasoning."""

import json
from pathlib import Path

import lm_eval.tasks.ifeval
import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from branchmerge.errors import UserError
from branchmerge.evaluation import benchmark
from branchmerge.evaluation.benchmark import Benchmark
from branchmerge.evaluation.requests import Messages, Response, Sampling

ROWS = [
    {"key": 1, "prompt": "Greet me without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2,
        "prompt": "Answer in lower case with at least three words.",
        "instruction_id_list": ["change_case:english_lowercase", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 3}],
    },
]
PLAIN = "this is what we would like to say about the weather of today"  # long enough to be told to be English
SAID = {
    PLAIN.capitalize(): [True, False],
    f"<think>\nA, b, c\n</think>\n{PLAIN}": [True, True],
    f"{PLAIN}, and of tomorrow": [False, True],
    "hello": [True, False],
    f"<think>\n{PLAIN}": [False, False],
}


@pytest.fixture(scope="module")
def ifeval(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    """lm-eval's task over rows of our own."""
    folder = tmp_path_factory.mktemp("ifeval")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    theirs = Path(lm_eval.tasks.ifeval.__path__[0]) / "ifeval.yaml"
    task = {
        "include": str(theirs),
        "task": "probe",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(rows)}},
    }
    (folder / "probe.yaml").write_text(json.dumps(task))  # JSON is YAML
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(["probe"])["tasks"]["probe"]
    return Benchmark(loaded, 1, Sampling(8), None)


@pytest.mark.parametrize("text", SAID, ids=repr)
def test_ifeval_grades_what_follows_the_reasoning(ifeval: Benchmark, text: str) -> None:
    verdicts = [ifeval.grade(request, Response(text, 3, "stop")).verdict for request in ifeval.requests(42)]
    assert [verdict.correct for verdict in verdicts] == SAID[text]
    assert [verdict.truncated for verdict in verdicts] == ["</think>" not in text and "<think>" in text] * 2


def test_examples_before_a_question_are_the_same_each_time() -> None:
    rows = Dataset.from_list([{"question": f"{n} + 1?", "sum": str(n + 1)} for n in range(40)])

    def prompts() -> dict[str, Messages]:
        task = ConfigurableTask(config={
            "task": "sums", "custom_dataset": lambda **_: {"test": rows, "train": rows}, "test_split": "test",
            "fewshot_split": "train", "num_fewshot": 3, "output_type": "generate_until",
            "doc_to_text": "{{question}}", "doc_to_target": "{{sum}}",
        })  # fmt: skip
        return Benchmark(task, 1, Sampling(8), None).prompts

    first = prompts()
    assert len({turns[:-1] for turns in first.values()}) > 30  # drawn for each question
    assert all(len(turns) == 7 for turns in first.values())
    assert prompts() == first


def test_a_task_that_runs_programs_unconfined_is_refused(ifeval: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_run import composed

    monkeypatch.setattr(ifeval.task.config, "unsafe_code", True)
    monkeypatch.setattr(benchmark, "_load_tasks", lambda _: {"humaneval": ifeval.task})
    with pytest.raises(UserError, match="humaneval: lm-eval would run a model's programs without a sandbox"):
        benchmark.load_benchmark(composed())


def test_a_task_that_lm_eval_cannot_load_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HumanEval, whose own code fails while it is imported."""
    from test_run import composed

    (tmp_path / "utils.py").write_text("raise ValueError('this task runs programs')")
    (tmp_path / "theirs.yaml").write_text("task: theirs\ndataset_path: json\nprocess_docs: !function utils.rows\n")
    theirs = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(benchmark, "task_manager", lambda *_, **__: theirs)
    with pytest.raises(UserError, match=r"benchmark\.tasks: lm-eval cannot load theirs \(.*\); take another task"):
        benchmark.load_benchmark(composed("benchmark.tasks=[theirs]"))
