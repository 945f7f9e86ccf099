"""Score models on a benchmark: what evaluate.py calls. A finished (model, task) is not scored again.

    tasks -> questions -> requests -> backend -> responses on disk -> graders -> score
                                       (those that are not there yet)

Grading goes on beside generation. What was generated is kept, so a killed run goes on where it was.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from branchmerge import machine
from branchmerge.config import EvaluateConfig
from branchmerge.errors import UserError
from branchmerge.evaluation import backends, models, preflight, sandbox, store
from branchmerge.evaluation.benchmark import Benchmark, load_benchmark
from branchmerge.evaluation.models import Model
from branchmerge.evaluation.requests import Request, Response
from branchmerge.evaluation.sample_store import SampleStore
from branchmerge.evaluation.scoring import Graded, summarise
from branchmerge.evaluation.store import Score
from branchmerge.student.backbone import check_tokenizer, load_tokenizer
from branchmerge.study import Study, locked, package_versions

PACKAGES = ("lm-eval", "transformers", "torch", "math-verify")
"""Whose versions decide a score"""


@dataclass
class Work:
    """A task for a model."""

    benchmark: Benchmark
    requests: list[Request]
    responses: SampleStore
    key: dict[str, Any]
    failures: list[str]

    @property
    def missing(self) -> list[Request]:
        return [request for request in self.requests if self.responses.get(request) is None]


def evaluate(config: EvaluateConfig) -> list[Score]:
    """Score every model on every task of the benchmark; returns the scores in that order.

    Raises:
        UserError: something does not fit together, or responses are missing and may not be (`allow_missing`)
    """
    found = models.find(config)
    for model in found:
        if model.folder is not None:
            check_tokenizer(load_tokenizer(model.folder), model.folder)
    if config.against is not None and config.against not in [model.name for model in found]:
        raise UserError(f"against={config.against}: choose one of {', '.join(model.name for model in found)}")
    sandbox.use(config.sandbox)
    tasks = load_benchmark(config)
    scores: list[Score] = []
    failed: list[str] = []
    for number, model in enumerate(found, start=1):
        place = f"[{number}/{len(found)}] {model.name}"
        with locked(Study(config).root / "scores" / model.name), ExitStack() as stack:
            told = _score_model(config, model, tasks, place, failed, stack)
        for score in told:
            lacking = f" ({score.missing} samples missing)" if score.missing else ""
            print(f"{place} {score.task}: {score.value:.3f} ± {score.stderr:.3f}{lacking}", flush=True)
        if len(told) == len(tasks):
            scores += told
        else:
            print(f"note: {model.name} has no responses to some tasks yet; the report is without it", flush=True)
    if failed and not config.allow_missing:
        raise UserError(
            f"{len(failed)} samples could not be generated, the first: {failed[0]}; run the same command again for"
            " them alone, or give allow_missing=true"
        )
    if not scores:
        raise UserError("there is nothing to report: no model has responses to every task yet")
    return scores


def _score_model(
    config: EvaluateConfig,
    model: Model,
    tasks: Sequence[Benchmark],
    place: str,
    failed: list[str],
    stack: ExitStack,
) -> list[Score]:
    """The scores of one model; what it loads for that is closed with the stack, and failures are added."""
    folder = Study(config).root / "scores" / model.name
    backend: backends.Backend | None = None
    scores = []
    for task in tasks:
        requests = task.requests(config.seed)
        key = _key(config, model, task)
        score = store.read(folder, task.name, key)
        if score is not None and not score.missing and not config.overwrite:
            scores.append(score)
            continue
        path = folder / "responses" / f"{task.name}.jsonl"
        if config.overwrite and not config.score_only:
            path.unlink(missing_ok=True)
        with SampleStore(path, _facts(config, model, task)) as responses:
            work = Work(task, requests, responses, key, [])
            if work.missing and not config.score_only:
                have = len(requests) - len(work.missing)
                known = f", {have} of {len(requests)} responses are there" if have else ""
                print(f"{place} scoring on {task.name}{known}", flush=True)
                if backend is None:
                    backend = backends.load(config.backend, model.folder)
                    stack.callback(backend.close)
                preflight.check(backend, work.missing, folder)
            score = _score(config, model, work, None if config.score_only else backend, folder)
        failed += work.failures
        if score is not None:
            scores.append(score)
    return scores


def _facts(config: EvaluateConfig, model: Model, task: Benchmark) -> dict[str, Any]:
    """What a response depends on besides its request."""
    return {
        "weights_sha256": model.weights.weights_sha256,
        "task_version": task.version,
        **backends.facts(config.backend),
    }


def _key(config: EvaluateConfig, model: Model, task: Benchmark) -> dict[str, Any]:
    """Everything that decides a score."""
    return {
        **_facts(config, model, task),
        **task.facts(),
        "seed": config.seed,
        "sandbox": task.sandbox_level(),
        "packages": {name: package_versions()[name] for name in PACKAGES},
    }


def _score(
    config: EvaluateConfig, model: Model, work: Work, backend: backends.Backend | None, folder: Path
) -> Score | None:
    """Generate what is missing, grade, store; None where there is not one response."""
    began = time.perf_counter()
    graded = _graded(config, work, backend)
    if not graded:
        print(f"{model.name} {work.benchmark.name}: there are no responses yet", flush=True)
        return None
    found = summarise(graded, work.benchmark.grader)
    score = Score(
        model=model.name,
        task=work.benchmark.name,
        value=found.accuracy.mean,
        stderr=found.accuracy.stderr,
        questions=found.accuracy.questions,
        no_answer=found.means.pop("no_answer"),
        output_tokens=found.means.pop("output_tokens"),
        key=work.key,
        seconds=round(time.perf_counter() - began, 2),
        machine=machine.describe(machine.device_of(config.backend.device)),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        samples=work.benchmark.samples,
        missing=len(work.requests) - len(graded),
        low=found.accuracy.low,
        high=found.accuracy.high,
        stderr_question=found.accuracy.stderr_question,
        stderr_sampling=found.accuracy.stderr_sampling,
        metrics=found.means,
        token_source=backends.token_source(config.backend),
    )
    store.write(folder, score, [one.row() for one in graded])
    return score


def _graded(config: EvaluateConfig, work: Work, backend: backends.Backend | None) -> list[Graded]:
    """All samples that there are, in the order of the requests; graded by threads while others are generated.

    The graders run programs and math-verify in processes of their own, so threads wait for them, no more.
    """
    missing = work.missing
    with ThreadPoolExecutor(machine.cores(), "grade") as pool:
        grading: dict[Request, Future[Graded]] = {}

        def begin(request: Request, response: Response) -> None:
            grading[request] = pool.submit(work.benchmark.grade, request, response)

        for request in work.requests:
            response = work.responses.get(request)
            if response is not None:
                begin(request, response)
        if missing and backend is not None:
            with tqdm(total=len(missing), desc=work.benchmark.name, unit="sample", disable=not config.progress) as bar:
                for pairs in backend.generate(missing):
                    work.responses.add(pairs)
                    for request, response in pairs:
                        begin(request, response)
                    bar.update(len(pairs))
            work.failures += backend.failures
        return [grading[request].result() for request in work.requests if request in grading]
