"""Score models on a benchmark: what evaluate.py calls. A finished (model, task) is not scored again.

    tasks -> questions -> requests -> backend -> responses on disk -> graders -> score
                                       (only missing ones are generated)

Samples are graded while others are generated. Responses are kept, so a killed run resumes where it was.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from branchmerge import machine
from branchmerge.config import EvaluateConfig
from branchmerge.errors import UserError
from branchmerge.evaluation import backends, models, preflight, sandbox, store
from branchmerge.evaluation.benchmark import Benchmark, load_benchmark
from branchmerge.evaluation.encoding import Encoder
from branchmerge.evaluation.graders import GRADING
from branchmerge.evaluation.models import Model
from branchmerge.evaluation.requests import Request, Response
from branchmerge.evaluation.sample_store import SampleStore
from branchmerge.evaluation.scoring import Graded, summarise
from branchmerge.evaluation.store import Score
from branchmerge.study import Study, locked
from branchmerge.versions import package_versions

PACKAGES = ("lm-eval", "transformers", "torch", "math-verify")
"""Packages whose versions can change a score"""


def evaluate(config: EvaluateConfig) -> list[Score]:
    """Score every model on every task of the benchmark; returns the scores in that order.

    Raises:
        UserError: models, tasks and settings do not fit together; or responses are missing, without `allow_missing`
    """
    found = models.find(config)
    if config.against is not None and config.against not in [model.name for model in found]:
        raise UserError(f"against={config.against}: choose one of {', '.join(model.name for model in found)}")
    sandbox.use(config.sandbox)
    tasks = load_benchmark(config)
    _preflight(config, found, tasks)
    scores: list[Score] = []
    failures: list[str] = []
    for number, model in enumerate(found, start=1):
        place = f"[{number}/{len(found)}] {model.name}"
        with locked(_folder(config, model), wait=not config.score_only) as alone:
            of_model, failed = _score_model(config, model, tasks, place, alone)
        failures += failed
        for score in of_model:
            lacking = f" ({score.missing} samples missing)" if score.missing else ""
            print(f"{place} {score.task}: {score.value:.3f} ± {score.stderr:.3f}{lacking}", flush=True)
        if len(of_model) == len(tasks):
            scores += of_model
        else:
            print(f"note: {model.name} has no responses to some tasks yet; the report is without it", flush=True)
    if failures and not config.allow_missing:
        raise UserError(
            f"{len(failures)} samples could not be generated, the first: {failures[0]}; run the same command again for"
            " them alone, or give allow_missing=true"
        )
    if not scores:
        raise UserError("there is nothing to report: no model has responses to every task yet")
    return scores


def _preflight(config: EvaluateConfig, found: Sequence[Model], tasks: Sequence[Benchmark]) -> None:
    """Find what would fail hours later, before the first model loads; print how programs are confined."""
    levels = {task.sandbox_level() for task in tasks} - {None}
    if levels:
        print(f"programs of the models run at the sandbox level {levels.pop()}", flush=True)
    if config.score_only:
        return
    to_come: list[Request] = []
    there = 0
    for model in found:
        encoder = Encoder(model.folder) if model.folder is not None else None
        context = backends.context(config.backend, model.folder)
        unscored = [task for task in tasks if _finished(config, model, task) is None]
        for task in unscored:
            requests = task.requests(config.seed)
            preflight.check_context(requests, context, encoder)
            to_come += requests
            path = _responses(config, model, task)
            there += path.stat().st_size if path.is_file() else 0
        if unscored and model.folder is not None and config.backend.kind == "hf":
            preflight.check_loads(model.folder)
    preflight.check_room(to_come, there, Study(config).root)


def _folder(config: EvaluateConfig, model: Model) -> Path:
    return Study(config).root / "scores" / model.name


def _responses(config: EvaluateConfig, model: Model, task: Benchmark) -> Path:
    return _folder(config, model) / "responses" / f"{task.name}.jsonl"


def _finished(config: EvaluateConfig, model: Model, task: Benchmark) -> Score | None:
    """The stored score, if it is complete and not to be replaced."""
    score = store.read(_folder(config, model), task.name, _key(config, model, task))
    return None if score is None or score.missing or config.overwrite else score


def _facts(config: EvaluateConfig, model: Model, task: Benchmark) -> dict[str, Any]:
    """What a response depends on, besides its request."""
    return {
        "weights_sha256": model.weights.weights_sha256,
        "task_version": task.version,
        **backends.facts(config.backend),
    }


def _key(config: EvaluateConfig, model: Model, task: Benchmark) -> dict[str, Any]:
    """Everything that decides a score."""
    return {
        **_facts(config, model, task),
        "model_files": model.files,
        **task.facts,
        "seed": config.seed,
        "sandbox": task.sandbox_level(),
        "grading": GRADING,
        "packages": {name: package_versions()[name] for name in PACKAGES},
    }


def _score_model(
    config: EvaluateConfig, model: Model, tasks: Sequence[Benchmark], place: str, alone: bool
) -> tuple[list[Score], list[str]]:
    """The scores of one model, and an error for each sample that could not be generated.

    Args:
        alone: no other run generates for this model; otherwise the scores are returned but not stored
    """
    scores: list[Score] = []
    failures: list[str] = []
    reused = False
    with ExitStack() as stack:

        @cache
        def backend() -> backends.Backend:
            """Loaded when the first task needs it."""
            loaded = backends.load(config.backend, model.folder)
            stack.callback(loaded.close)
            return loaded

        for task in tasks:
            score = _finished(config, model, task)
            if score is not None:
                reused = True
            else:
                score, failed, had_responses = _score_task(config, model, task, place, alone, backend)
                failures += failed
                reused = reused or had_responses
            if score is not None:
                scores.append(score)
    if reused and model.folder is None and not config.backend.revision:
        print(
            f"note: stored responses of {config.backend.model} are used; if another model is served under that name"
            " now, set backend.revision=",
            flush=True,
        )
    return scores, failures


def _score_task(
    config: EvaluateConfig,
    model: Model,
    task: Benchmark,
    place: str,
    alone: bool,
    backend: Callable[[], backends.Backend],
) -> tuple[Score | None, list[str], bool]:
    """Generate the responses that are missing and grade all.

    Returns:
        The score, None if there is no response; an error for each sample that could not be generated; and whether
        stored responses were used.
    """
    began = time.perf_counter()
    path = _responses(config, model, task)
    if config.overwrite and not config.score_only:
        path.unlink(missing_ok=True)
    with SampleStore(path, _facts(config, model, task), model.files, read_only=config.score_only) as responses:
        requests = task.requests(config.seed)
        missing = [request for request in requests if responses.get(request) is None]
        generating = bool(missing) and not config.score_only
        if generating:
            print(f"{place} scoring on {task.name}: {len(missing)} of {len(requests)} responses", flush=True)
        graded = _graded(config, task, requests, responses, backend() if generating else None)
    failures = backend().failures if generating else []
    reused = len(missing) < len(requests)
    if not graded:
        return None, failures, reused
    seconds = time.perf_counter() - began
    rows = [one.row() for one in graded]
    score = store.signed(_score(config, model, task, graded, len(requests) - len(graded), seconds), rows)
    if alone:
        store.write(_folder(config, model), score, rows)
    return score, failures, reused


def _graded(
    config: EvaluateConfig,
    task: Benchmark,
    requests: Sequence[Request],
    responses: SampleStore,
    backend: backends.Backend | None,
) -> list[Graded]:
    """All graded samples, in the order of the requests; threads grade some while others are generated.

    The graders run programs and math-verify in processes of their own, so the threads only wait for these.
    """
    with _threads() as pool:
        grading: dict[Request, Future[Graded]] = {}

        def begin(request: Request, response: Response) -> None:
            grading[request] = pool.submit(task.grade, request, response)

        missing = []
        for request in requests:
            response = responses.get(request)
            if response is None:
                missing.append(request)
            else:
                begin(request, response)
        if missing and backend is not None:
            with tqdm(total=len(missing), desc=task.name, unit="sample", disable=not config.progress) as bar:
                for pairs in backend.generate(missing):
                    responses.add(pairs)
                    for request, response in pairs:
                        begin(request, response)
                    bar.update(len(pairs))
        return [grading[request].result() for request in requests if request in grading]


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """One thread per core; after an error, work that has not begun is dropped."""
    pool = ThreadPoolExecutor(machine.cores(), "grade")
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _score(
    config: EvaluateConfig, model: Model, task: Benchmark, graded: Sequence[Graded], missing: int, seconds: float
) -> Score:
    accuracy, means = summarise(graded, task.grader)
    return Score(
        model=model.name,
        task=task.name,
        value=accuracy.mean,
        stderr=accuracy.stderr,
        questions=accuracy.questions,
        no_answer=means.pop("no_answer"),
        output_tokens=means.pop("output_tokens"),
        key=_key(config, model, task),
        seconds=round(seconds, 2),
        machine=machine.describe(machine.device_of(config.backend.device)),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        samples=task.samples,
        missing=missing,
        low=accuracy.low,
        high=accuracy.high,
        stderr_question=accuracy.stderr_question,
        stderr_sampling=accuracy.stderr_sampling,
        metrics=means,
        token_source=backends.token_source(config.backend),
    )
