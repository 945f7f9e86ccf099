"""An lm-eval task as questions and a grader. Our own tasks name their grader; others are graded by lm-eval's code."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from branchmerge.config import EvaluateConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.graders import Verdict, grade
from branchmerge.evaluation.prompts import system_prompt
from branchmerge.evaluation.requests import Messages, Request, Response, Sampling, requests_for
from branchmerge.evaluation.scoring import Graded
from branchmerge.trajectories.schema import Message, Reference

TASKS = Path(__file__).with_name("tasks")
RUNS_CODE = {"code", "livecodebench"}
"""Graders that run programs"""


@dataclass
class Benchmark:
    """A task with the number of samples and the prompts of this evaluation."""

    task: Any
    """lm-eval's"""
    samples: int
    sampling: Sampling
    system: str | None
    limit: int | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = str(self.task.config.task)
        if self.task.OUTPUT_TYPE != "generate_until":
            raise UserError(f"{self.name}: compares likelihoods; evaluate.py scores tasks that generate")

    @property
    def version(self) -> str:
        return str(self.task.VERSION)

    @cached_property
    def docs(self) -> dict[str, Mapping[str, Any]]:
        """The questions by id; raises UserError where two have one id."""
        docs = list(self.task.eval_docs)[: self.limit]
        named = {str(doc.get("id", number)): doc for number, doc in enumerate(docs)}
        if len(named) != len(docs):
            raise UserError(f"{self.name}: {len(docs) - len(named)} questions have the id of another one")
        return named

    @cached_property
    def grader(self) -> str:
        """That our own tasks' questions name, all the same; empty for lm-eval's tasks."""
        first = next(iter(self.docs.values()))
        return str(first["reference"]["grader"]) if _is_ours(first) else ""

    def requests(self, seed: int) -> list[Request]:
        """All samples of all questions."""
        questions = [(question, self._messages(doc)) for question, doc in self.docs.items()]
        return requests_for(self.name, questions, self.samples, self.sampling, seed)

    def _messages(self, doc: Mapping[str, Any]) -> Messages:
        """As lm-eval would hand them to a chat template, few-shot examples included."""
        told = self.task.fewshot_context(
            doc, num_fewshot=self.task.config.num_fewshot or 0, system_instruction=self.system,
            apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lambda turns, **_: json.dumps(turns),
        )  # fmt: skip
        return tuple(Message(turn["role"], turn["content"]) for turn in json.loads(told))

    def grade(self, request: Request, response: Response) -> Graded:
        """Grade one response, with the grader that the question names."""
        doc = self.docs[request.question]
        if _is_ours(doc):
            return Graded(request, response, grade(response.text, Reference.parse(doc["reference"])))
        # lm-eval's own tasks do not know of reasoning: they get what follows it.
        answer = response.text.rpartition("</think>")[2]
        metrics = self.task.process_results(dict(doc), [answer])
        main, *_ = [entry["metric"] for entry in self.task.config.metric_list]
        value = metrics.get(main, next(iter(metrics.values())))
        return Graded(request, response, Verdict(bool(value), "" if value else "wrong_answer", ""))

    def facts(self) -> dict[str, Any]:
        """What of a task decides a score."""
        digest = hashlib.sha256()
        for question, doc in self.docs.items():  # one by one: the tests of programs are large
            prompt = [turn.as_dict() for turn in self._messages(doc)]
            digest.update(json.dumps([question, prompt, doc], sort_keys=True, default=str).encode())
        return {
            "sampling": {**self.sampling.__dict__, "until": list(self.sampling.until)},
            "samples": self.samples,
            "docs_sha256": digest.hexdigest(),
        }

    def sandbox_level(self) -> str | None:
        """How this task's programs are confined; None where it runs none."""
        if self.grader not in RUNS_CODE:
            return None
        from branchmerge.evaluation.sandbox import shared

        return shared().level


def _is_ours(doc: Mapping[str, Any]) -> bool:
    return isinstance(doc.get("reference"), Mapping) and "grader" in doc["reference"]


def load_benchmark(config: EvaluateConfig) -> list[Benchmark]:
    """The benchmark's tasks; raises UserError on a name that lm-eval does not know."""
    chosen = config.benchmark
    found = []
    for name, task in _load_tasks(config).items():
        given = Sampling.parse(name, task.config.generation_kwargs or {})
        if chosen.max_new_tokens is not None:
            given = Sampling(**{**given.__dict__, "max_new_tokens": chosen.max_new_tokens})
        samples = chosen.samples or int(task.config.repeats or 1)
        system = system_prompt(name, chosen.prompt_style)
        found.append(Benchmark(task, samples, given, system, chosen.limit))
    return found


def _load_tasks(config: EvaluateConfig) -> dict[str, Any]:
    own = sorted(path.stem for path in TASKS.glob("*.yaml"))
    manager = task_manager(config, include_defaults=not set(config.benchmark.tasks) <= set(own))
    unknown = [name for name in config.benchmark.tasks if name not in {*manager.all_tasks}]
    if unknown:
        known = ", ".join(own)
        raise UserError(f"benchmark.tasks: lm-eval knows no task {unknown[0]}; branchmerge's own are {known}")
    return dict(manager.load(config.benchmark.tasks)["tasks"])


def task_manager(config: EvaluateConfig, include_defaults: bool) -> Any:
    """lm-eval's catalogue of tasks; with its own ones it takes seconds to read."""
    from lm_eval.tasks import TaskManager

    # lm-eval logs its metadata mechanism as a warning for every task that uses it.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {
        "data_dir": config.benchmark.data_dir or config.study.data_dir,
        "prompt_style": config.benchmark.prompt_style,
        "livecodebench_release": config.benchmark.livecodebench_release,
        "livecodebench_start": config.benchmark.livecodebench_start,
        "livecodebench_end": config.benchmark.livecodebench_end,
    }
    metadata = {name: value for name, value in metadata.items() if value is not None}
    return TaskManager(include_path=str(TASKS), include_defaults=include_defaults, metadata=metadata)
