"""Score models on a benchmark: what evaluate.py calls. A finished (model, task) is not scored again."""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchmerge import machine
from branchmerge.config import EvaluateConfig
from branchmerge.errors import UserError
from branchmerge.evaluation import backends, models, store
from branchmerge.evaluation.models import Model
from branchmerge.evaluation.stats import mean_and_stderr
from branchmerge.evaluation.store import Score
from branchmerge.student.backbone import check_tokenizer, load_tokenizer
from branchmerge.study import Study, locked, package_versions

TASKS = Path(__file__).with_name("tasks")


def evaluate(config: EvaluateConfig) -> list[Score]:
    """Score every model on every task of the benchmark; returns the scores in that order."""
    found = models.find(config)
    for model in found:
        check_tokenizer(load_tokenizer(model.folder), model.folder)
    tasks = _load_tasks(config)
    scores: list[Score] = []
    for number, model in enumerate(found, start=1):
        folder = Study(config).root / "scores" / model.name
        with locked(folder):
            known = {name: store.read(folder, name, _key(config, model, task)) for name, task in tasks.items()}
            missing = [name for name, score in known.items() if score is None or config.overwrite]
            if missing:
                print(f"[{number}/{len(found)}] scoring {model.name} on {', '.join(missing)}", flush=True)
                lm = backends.load(config.backend, model.folder)
            for name in missing:
                known[name] = _score(config, model, tasks[name], lm, folder)
            for name in tasks:
                score = known[name]
                assert score is not None
                print(
                    f"[{number}/{len(found)}] {model.name} {name}: {score.value:.3f} ± {score.stderr:.3f}", flush=True
                )
                scores.append(score)
    return scores


def _load_tasks(config: EvaluateConfig) -> dict[str, Any]:
    """The benchmark's lm-eval tasks by name; raises UserError on a name that lm-eval does not know."""
    own = sorted(path.stem for path in TASKS.glob("*.yaml"))
    manager = _task_manager(config, include_defaults=not set(config.benchmark.tasks) <= set(own))
    unknown = [name for name in config.benchmark.tasks if name not in manager.all_tasks]
    if unknown:
        known = ", ".join(own)
        raise UserError(f"benchmark.tasks: lm-eval knows no task {unknown[0]}; branchmerge's own are {known}")
    loaded = manager.load(config.benchmark.tasks)
    return dict(loaded["tasks"])


def _task_manager(config: EvaluateConfig, include_defaults: bool) -> Any:
    """lm-eval's catalogue of tasks; with its own ones it takes seconds to read."""
    from lm_eval.tasks import TaskManager

    # lm-eval logs its metadata mechanism as a warning for every task that uses it.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(
        include_path=str(TASKS), include_defaults=include_defaults, metadata={"data_dir": config.study.data_dir}
    )


def _key(config: EvaluateConfig, model: Model, task: Any) -> dict[str, Any]:
    """Everything that decides a score."""
    return {
        "weights_sha256": model.weights.weights_sha256,
        "task_version": task.VERSION,
        "generation": dict(task.config.generation_kwargs or {}),
        "docs_sha256": _docs_sha256(task, config.benchmark.limit),
        "backend": config.backend.kind,
        "dtype": backends.dtype_of(config.backend),
        "batch_size": config.backend.batch_size,
        "seed": config.seed,
        "packages": {name: package_versions()[name] for name in ("lm-eval", "transformers", "torch", "math-verify")},
    }


def _docs_sha256(task: Any, limit: int | None) -> str:
    """Fingerprint of the questions and references that are asked."""
    docs = list(task.eval_docs)[:limit]
    return hashlib.sha256(json.dumps(docs, sort_keys=True, default=str).encode()).hexdigest()


def _score(config: EvaluateConfig, model: Model, task: Any, lm: Any, folder: Path) -> Score:
    """Generate, grade, store."""
    from lm_eval import simple_evaluate

    name = task.config.task
    began = time.perf_counter()
    results = simple_evaluate(
        model=lm,
        tasks=[task],
        limit=config.benchmark.limit,
        apply_chat_template=True,
        bootstrap_iters=0,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
        confirm_run_unsafe_code=True,
        task_manager=_task_manager(config, include_defaults=False),
    )
    assert results is not None
    samples = [_sample(raw) for raw in results["samples"][name]]
    lengths = [len(lm.tokenizer(s["response"], add_special_tokens=False)["input_ids"]) for s in samples]
    for sample, length in zip(samples, lengths, strict=True):
        sample["output_tokens"] = length
    value, stderr = mean_and_stderr([sample["accuracy"] for sample in samples])
    score = Score(
        model=model.name,
        task=name,
        value=value,
        stderr=stderr,
        questions=len(samples),
        no_answer=mean_and_stderr([sample["no_answer"] for sample in samples])[0],
        output_tokens=mean_and_stderr([float(length) for length in lengths])[0],
        key=_key(config, model, task),
        seconds=round(time.perf_counter() - began, 2),
        machine=machine.describe(machine.device_of(config.backend.device)),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    store.write(folder, score, samples)
    return score


def _sample(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of one question: what was asked and said, and the verdict."""
    return {
        "id": raw["doc"].get("id", raw["doc_id"]),
        "prompt": raw["arguments"][0][0],
        "response": raw["resps"][0][0],
        "reference": raw["doc"].get("reference"),
        "accuracy": raw["accuracy"],
        "no_answer": raw["no_answer"],
    }
