"""An lm-eval task as questions and a grader. Our own tasks name their grader; others are graded by lm-eval's code."""

import hashlib
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from branchmerge.config import EvaluateConfig
from branchmerge.errors import UserError
from branchmerge.evaluation.graders import NO_ANSWER, RUNS_CODE, WRONG_ANSWER, Verdict, final_part, grade
from branchmerge.evaluation.prompts import system_prompt
from branchmerge.evaluation.requests import Messages, Request, Response, Sampling, requests_for
from branchmerge.evaluation.sandbox import shared
from branchmerge.evaluation.scoring import Graded
from branchmerge.trajectories.schema import Message, Reference

TASKS = Path(__file__).with_name("tasks")
OWN = sorted(path.stem for path in TASKS.glob("*.yaml"))
"""The tasks and groups that branchmerge brings"""
FEWSHOT_SEED = 1234
"""lm-eval's default seed; without one, few-shot examples, and so prompts and keys, would differ from run to run"""


@dataclass
class Benchmark:
    """A task, with this evaluation's number of samples and prompts."""

    task: Any
    """The task as lm-eval loaded it"""
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
        """The questions by id; raises UserError if two share one."""
        docs = list(self.task.eval_docs)[: self.limit]
        named = {str(doc.get("id", number)): doc for number, doc in enumerate(docs)}
        if len(named) != len(docs):
            raise UserError(f"{self.name}: {len(docs) - len(named)} questions have the id of another one")
        return named

    @cached_property
    def grader(self) -> str:
        """The grader that all questions of our own tasks name; empty for lm-eval's tasks."""
        first = next(iter(self.docs.values()))
        return str(first["reference"]["grader"]) if _is_ours(first) else ""

    @cached_property
    def prompts(self) -> dict[str, Messages]:
        """The prompt of each question, by its id."""
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        return {question: self._messages(doc) for question, doc in self.docs.items()}

    def requests(self, seed: int) -> list[Request]:
        """All samples of all questions."""
        return requests_for(self.name, list(self.prompts.items()), self.samples, self.sampling, seed)

    def _messages(self, doc: Mapping[str, Any]) -> Messages:
        """The messages that lm-eval would pass to a chat template, including few-shot examples."""
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
        # lm-eval's own tasks do not expect reasoning, so they get only what follows it.
        answer = final_part(response.text)
        if answer is None:
            return Graded(request, response, Verdict(False, NO_ANSWER, truncated=True))
        return Graded(request, response, self._grade_by_lm_eval(dict(doc), answer))

    def _grade_by_lm_eval(self, doc: dict[str, Any], answer: str) -> Verdict:
        """Grade by the task's first filter and first metric, which must be 0 or 1.

        Raises:
            UserError: the metric is another number
        """
        instance = Instance("generate_until", doc, (), 0)
        instance.resps = [answer]
        metric = self.task.config.metric_list[0]["metric"]
        with _LM_EVAL:
            for ensemble in self.task._filters:
                ensemble.apply([instance])
            filtered = next(iter(instance.filtered_resps.values()))
            value = self.task.process_results(doc, [filtered])[metric]
        if value not in (0, 1):
            raise UserError(f"{self.name}: its metric {metric} gives {value}; evaluate.py scores right and wrong")
        return Verdict(bool(value), "" if value else WRONG_ANSWER, str(filtered))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The properties of a task that decide a score."""
        digest = hashlib.sha256()
        for question, doc in self.docs.items():  # one by one: the tests of programs are large
            prompt = [turn.as_dict() for turn in self.prompts[question]]
            digest.update(json.dumps([question, prompt, doc], sort_keys=True, default=str).encode())
        return {
            "sampling": asdict(self.sampling) | {"until": list(self.sampling.until)},  # as it is read back
            "samples": self.samples,
            "docs_sha256": digest.hexdigest(),
        }

    def sandbox_level(self) -> str | None:
        """How this task's programs are confined; None if it runs none."""
        if self.grader not in RUNS_CODE:
            return None
        return shared().level


_LM_EVAL = threading.Lock()
"""lm-eval's filters and metrics are not thread-safe."""


def _is_ours(doc: Mapping[str, Any]) -> bool:
    return isinstance(doc.get("reference"), Mapping) and "grader" in doc["reference"]


def load_benchmark(config: EvaluateConfig) -> list[Benchmark]:
    """The benchmark's tasks; raises UserError on a name that lm-eval does not know."""
    chosen = config.benchmark
    found = []
    for name, task in _load_tasks(config).items():
        if task.config.unsafe_code and name not in OWN:
            raise UserError(
                f"{name}: lm-eval would run a model's programs without a sandbox; ask for livecodebench, whose programs"
                " run in one, or run lm_eval by itself"
            )
        given = Sampling.parse(name, task.config.generation_kwargs or {})
        if chosen.max_new_tokens is not None:
            given = replace(given, max_new_tokens=chosen.max_new_tokens)
        samples = chosen.samples or int(task.config.repeats or 1)
        if (chosen.samples or 1) > 1 and not given.temperature:
            print(f"note: {name} is greedy, so the {samples} samples of a question are likely the same one", flush=True)
        system = system_prompt(name, chosen.prompt_style)
        found.append(Benchmark(task, samples, given, system, chosen.limit))
    return found


def _load_tasks(config: EvaluateConfig) -> dict[str, Any]:
    manager = task_manager(config, include_defaults=not set(config.benchmark.tasks) <= set(OWN))
    unknown = [name for name in config.benchmark.tasks if name not in manager.all_tasks]
    if unknown:
        known = ", ".join(OWN)
        raise UserError(f"benchmark.tasks: lm-eval knows no task {unknown[0]}; branchmerge's own are {known}")
    try:
        return dict(manager.load(config.benchmark.tasks)["tasks"])
    except ModuleNotFoundError as error:
        raise UserError(
            f"benchmark.tasks: {', '.join(config.benchmark.tasks)} needs the Python package {error.name}, which is not"
            f" installed; pip install {error.name}"
        ) from error
    except (ConnectionError, FileNotFoundError) as error:  # an unknown data set is a FileNotFoundError
        raise UserError(
            f"benchmark.tasks: the questions of {', '.join(config.benchmark.tasks)} cannot be loaded ({error}); reach"
            " the hub, or have them in its cache"
        ) from error
    except Exception as error:
        if set(config.benchmark.tasks) <= set(OWN):
            raise
        # lm-eval's tasks run code of their own: HumanEval's asks for a grader of the hub, and leave to run programs.
        told = f"{', '.join(config.benchmark.tasks)} ({type(error).__name__}: {error})"
        raise UserError(
            f"benchmark.tasks: lm-eval cannot load {told}; take another task, or run lm_eval by itself"
        ) from error


def task_manager(config: EvaluateConfig, include_defaults: bool) -> Any:
    """lm-eval's catalogue of tasks; including its own ones takes seconds."""
    from lm_eval.tasks import TaskManager

    # lm-eval logs its metadata mechanism as a warning for every task that uses it.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {
        "data_dir": config.benchmark.data_dir or config.study.data_dir,
        "prompt_style": config.benchmark.prompt_style,
        "livecodebench_release": config.benchmark.livecodebench_release,
        "livecodebench_start": config.benchmark.livecodebench_start,
        "livecodebench_end": config.benchmark.livecodebench_end,
        "livecodebench_grader": config.benchmark.livecodebench_grader,
    }
    metadata = {name: value for name, value in metadata.items() if value is not None}
    return TaskManager(include_path=str(TASKS), include_defaults=include_defaults, metadata=metadata)
