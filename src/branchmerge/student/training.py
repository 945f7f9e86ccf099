"""Train one branch: what train.py calls."""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything

from branchmerge import machine
from branchmerge.config import TrainConfig
from branchmerge.config_checks import check_groups, check_packages
from branchmerge.data import held_out
from branchmerge.data.datamodule import Corpus, TrajectoryData, data_account
from branchmerge.data.prepared import prepared
from branchmerge.errors import UserError
from branchmerge.files import writing
from branchmerge.student import agreement, attention, backbone, places, ranks, trials
from branchmerge.student.bf16_products import products_in_float32
from branchmerge.student.checkpoints import CheckpointFolder
from branchmerge.student.context_parallel import ContextGroup, rows_of
from branchmerge.student.ending import Ending
from branchmerge.student.export import check_finite, check_room, export, numbers_in
from branchmerge.student.forecast import bytes_of_training
from branchmerge.student.loggers import claim, loggers_of
from branchmerge.student.loss import PackedLoss
from branchmerge.student.module import Student
from branchmerge.student.preflight import check_shape
from branchmerge.student.resume import EndWhenTold, Resume
from branchmerge.student.sharding import (
    Sharding,
    Spread,
    check_shardable,
    check_weights,
    compile_layers,
    load_weights,
    shard,
)
from branchmerge.student.step_rows import StepRows
from branchmerge.student.stored import empty_model
from branchmerge.student.watch import watchers
from branchmerge.study import Manifest, Parent, is_done, locked, publish, read_manifest
from branchmerge.trajectories.sources import check_files, unpinned


def train(config: TrainConfig) -> Path:
    """Train the branch that `config` describes and publish its checkpoint; finished work is not repeated.

    If this process is one of several (torchrun, Slurm), all of them call this together; the first one prints, holds the
    lock and publishes. They stay in the process group until `ranks.leave`.

    Returns:
        The folder of the expert (or of the backbone, for domain=warmup).
    """
    check_packages(config)
    device = _device(config)
    ranks.join(device)
    _check_processes(config)
    start = ranks.by_first(lambda: backbone.locate(config, config.domain.name))
    ranks.check_seen(start, "give a backbone.path= on a disk that all nodes share (for one of the hub: share HF_HOME)")
    shape = backbone.read_config(start)
    check_shape(config, shape)
    precision = _precision(config.trainer.precision, device)
    agreement.check_alike(start, precision)
    folder = places.result(config)
    if folder.resolve() == start.resolve():
        raise UserError(f"out={folder}: is the model that the branch starts from; give another out=")
    ranks.by_first(lambda: check_files(config))  # report a mistake before waiting for another run
    for name in unpinned(config):
        ranks.say(
            f"warning: {name}: a dataset of the hub without a revision may change from run to run without a word; set"
            f" study.corpus.{name}.revision=COMMIT"
        )
    with ExitStack() as stack:
        ranks.by_first(lambda: stack.enter_context(locked(folder)))
        known = ranks.by_first(lambda: _known_weights(start))
        parent = Parent(str(start), known or agreement.weights_sha256(start))
        planned = ranks.by_first(
            lambda: _plan_manifest(config, parent, precision)
        )  # not before the lock: files of rows may change while waiting for it
        ranks.by_first(lambda: _check_redo(config, folder))
        if ranks.by_first(lambda: is_done(folder, planned, config.overwrite)) and not config.redo:
            ranks.say(f"{folder}: done already")
            _saved(config, planned).remove()  # left by a run that was killed after publishing
            return folder
        ranks.say(f"{folder}: training domain {config.domain.name} from {start}")
        saved = _saved(config, planned)
        if known:
            agreement.check_fingerprint(start, known)
        attn = _attention(config, shape, device, _compute(precision))
        ranks.by_first(lambda: check_weights(start, config.trainer.sharded, config.trainer.recomputes))
        ranks.by_first(lambda: check_room(start, folder, getattr(torch, config.export_dtype)))
        ranks.check_shared(saved.folder)
        ranks.by_first(saved.tell_of_others)
        if config.trainer.checkpoint.is_on:
            ranks.by_first(lambda: saved.tell_if_small(bytes_of_training(config) * numbers_in(start)))
        corpus = prepared(config, start, saved.folder / "corpus", ranks.by_first(saved.has_some), planned.data)
        saved.rows = corpus.fingerprint
        _report_rows(corpus)
        ending = stack.enter_context(Ending())
        with publish(folder, planned) if ranks.is_first() else _helping(folder) as partial:
            student, facts = _fit(config, start, device, precision, attn, corpus, saved, ending)
            planned.data = corpus.account
            planned.training = facts
            check_finite(student.model, f"{folder}: after training")
            planned.weights_sha256 = export(student.model, start, partial, getattr(torch, config.export_dtype))
        saved.remove()
        ranks.wait()  # until the first process has published
        loss = "not finite" if facts["last_loss"] is None else f"{facts['last_loss']:.3f}"
        ranks.say(
            f"{folder}: {facts['steps']} steps, {facts['tokens']} tokens, {facts['seconds']:.0f} s,"
            f" {facts['tokens_per_second']:.0f} tokens/s, last loss {loss}"
        )
    return folder


@contextmanager
def _helping(folder: Path) -> Iterator[Path]:
    """What `publish` is for the first process. All word a full disk alike, so that the error is printed only once."""
    with writing(folder):
        yield folder


def _check_redo(config: TrainConfig, folder: Path) -> None:
    """Refuse to replace a finished result, except one that was itself made with debug=."""
    found = read_manifest(folder) if config.redo else None
    if found is not None and not found.config.get("redo"):
        raise UserError(f"out={folder}: holds a finished result, which debug= would replace; give another out=")


def _device(config: TrainConfig) -> torch.device:
    """The device that this process trains on."""
    device = machine.device_of(config.trainer.accelerator)
    found = ranks.environment() if config.trainer.sharded else None
    if device.type != "cuda" or found is None:
        return device
    number, there = found.local_rank(), torch.cuda.device_count()
    if number >= there:
        raise UserError(
            f"process {number} of this node (from 0) finds {there} CUDA devices; start one process a device, and let"
            " each see all of them (Slurm: --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", number)


def _rows_of_each(config: TrainConfig, shares: int) -> int:
    """Rows of a step for each device (or group of devices), rounded up: with a remainder, some get an idle row."""
    rows = config.optim.global_batch
    most = -(-rows // shares)
    if rows % shares:
        ranks.say(
            f"warning: optim.global_batch={rows}: {shares} devices cannot share the rows of a step equally, so"
            f" {most * shares - rows} of {most * shares} places stay empty; a multiple of {shares} uses all"
        )
    return most


def _check_processes(config: TrainConfig) -> None:
    """Refuse a configuration that does not fit the number of processes."""
    world, nodes = ranks.world(), config.trainer.num_nodes
    if not config.trainer.sharded and world > 1:
        raise UserError(f"{world} processes were started for a training on one device; use trainer=fsdp")
    check_groups(config.trainer, world)
    if world % nodes or (config.trainer.devices is not None and config.trainer.devices * nodes != world):
        raise UserError(
            f"{world} processes were started, trainer.num_nodes={nodes} and trainer.devices={config.trainer.devices}"
            " ask for others; set them to what torchrun or Slurm starts"
        )


def _fit(
    config: TrainConfig,
    start: Path,
    device: torch.device,
    precision: str,
    attn: str,
    corpus: Corpus,
    saved: CheckpointFolder,
    ending: Ending,
) -> tuple[Student, dict[str, Any]]:
    """Load the backbone, train it over the plan, and return it with the facts for the manifest.

    Continues from the newest checkpoint that is whole.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The `srun` command")  # torchrun starts processes as well
    seed_everything(config.seed, workers=True, verbose=False)
    steps = len(corpus.plan.steps)
    begin = saved.newest()
    first_step = begin.step if begin else 0
    if begin is not None:
        ranks.say(f"{begin.folder}: going on after step {begin.step} of {steps}")
    context = ContextGroup.join(config.trainer.context_parallel)
    share, shares = rows_of(context)
    student = _student(config, start, _compute(precision), attn, steps, context)
    logs = places.logs(config)
    run = {"attention": attn, "torch": torch.__version__, "devices": ranks.from_all(machine.describe(device))}
    resume = Resume(saved, config.trainer.checkpoint, begin, run)
    with ExitStack() as during:
        ranks.by_first(lambda: claim(logs, saved.folder.name))
        loggers = during.enter_context(loggers_of(config, logs, first_step)) if ranks.is_first() else False
        trainer = Trainer(
            **_devices(config, device, precision),
            max_epochs=1,  # the plan contains all epochs, in order
            accumulate_grad_batches=_rows_of_each(config, shares),
            gradient_clip_val=config.optim.grad_clip or None,
            logger=loggers,
            default_root_dir=logs,
            callbacks=[
                resume,
                *watchers(config, corpus, start, logs, ending),
                EndWhenTold(resume, ending),
                StepRows(config.data.seq_len),
            ],
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic=device.type == "cpu",
            log_every_n_steps=1,
        )
        data = TrajectoryData(corpus, first_step, share, shares, config.data.workers, device.type == "cuda")
        during.enter_context(_products(precision, device))
        try:
            trainer.fit(student, datamodule=data)
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # the Trainer turns it into a silent exit status of 1
                raise KeyboardInterrupt from end
            raise
    seconds = resume.seconds
    student.tell_if_broken_at_the_end()
    last_loss = float(trainer.callback_metrics["loss"])  # not finite if that step was skipped
    facts = {
        "steps": trainer.global_step, "skipped_steps": student.skipped,
        "tokens": corpus.tokens, "supervised_tokens": corpus.supervised,
        "seconds": round(seconds, 2), "tokens_per_second": round(corpus.tokens / seconds, 1),
        "last_loss": last_loss if math.isfinite(last_loss) else None,
        "precision": precision, "runs": resume.runs, "logs": str(logs),
    }  # fmt: skip
    return student, facts


def _student(
    config: TrainConfig, start: Path, compute: torch.dtype, attn: str, steps: int, context: ContextGroup | None
) -> Student:
    """The student; its weights are loaded already if it is on one device, and later if it is sharded."""
    trainer, spread = config.trainer, None
    with backbone.loading(start):
        model = empty_model(start, attn) if trainer.sharded else backbone.load_model(start, torch.float32, attn)
    if trainer.sharded:
        check_shardable(model)
        sharding = Sharding(compute, trainer.replicate, trainer.cpu_offload)

        def spread(packed: PackedLoss, device: torch.device) -> None:
            shard(packed, model, sharding, sharding.mesh(device.type, ranks.world()))
            load_weights(model, start, torch.device("cpu") if sharding.cpu_offload else device)

    if trainer.recomputes:
        model.gradient_checkpointing_enable()
    if trainer.compile:
        compile_layers(model)
    model.train()
    fused = config.backbone.loss == "liger"
    packed = PackedLoss(model, context, trainer.compile)
    return Student(packed, config.optim, steps, trainer.max_skipped_steps, spread, compute, fused)


def _devices(config: TrainConfig, device: torch.device, precision: str) -> dict[str, Any]:
    """The Trainer's arguments about devices and precision."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    if not config.trainer.sharded:
        return {"accelerator": accelerator, "devices": 1, "precision": precision}
    nodes = config.trainer.num_nodes
    # FSDP sets the dtype of the products; autocast on top of it would cast twice.
    return {
        "accelerator": accelerator, "devices": ranks.world() // nodes, "num_nodes": nodes, "precision": "32-true",
        "strategy": Spread(ranks.world()), "plugins": [ranks.environment()],
    }  # fmt: skip


def _report_rows(corpus: Corpus) -> None:
    """Print how many rows were kept and dropped, before the long work starts."""
    for name, entry in corpus.account["sources"].items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in entry["dropped"].items()) or "none"
        ranks.say(
            f"{name}: kept {entry['kept']} of {entry['read']} rows ({entry['unverified']} unverified,"
            f" {entry['truncated']} truncated); dropped: {dropped}"
        )
    ranks.say(f"{len(corpus.plan.steps)} steps, {corpus.tokens} tokens, {corpus.supervised} of them learned")


def _saved(config: TrainConfig, planned: Manifest) -> CheckpointFolder:
    return CheckpointFolder(places.checkpoints(config), planned, config.trainer.checkpoint.keep_last)


def _precision(asked: str, device: torch.device) -> str:
    """Lightning's name of the precision, with float32 weights; `auto` is bf16-mixed if the device is faster at it."""
    if asked != "auto":
        return asked
    return "bf16-mixed" if machine.computes_bf16(device) else "32-true"


def _attention(config: TrainConfig, shape: dict[str, Any], device: torch.device, compute: torch.dtype) -> str:
    """Name of the attention that is configured and works on this device; chosen before any row is graded."""
    attn = attention.implementation(config.backbone.attn, device, compute, config.trainer.context_parallel > 1)
    return trials.choose_attention(attn, shape, device, compute)


def _compute(precision: str) -> torch.dtype:
    """dtype of the matrix products."""
    return torch.bfloat16 if precision == "bf16-mixed" else torch.float32


def _products(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context that computes bfloat16 products in float32 on a CPU without instructions for bfloat16, if needed."""
    slow = precision == "bf16-mixed" and device.type == "cpu" and not machine.computes_bf16(device)
    return products_in_float32() if slow else nullcontext()


def _optim(config: TrainConfig) -> dict[str, Any]:
    """The optimizer's settings that decide the result, without `adamw`, as in manifests from before that setting."""
    return {key: value for key, value in asdict(config.optim).items() if (key, value) != ("optimizer", "adamw")}


def _known_weights(start: Path) -> str:
    """Fingerprint of the backbone's weights by its manifest, or ""; spares hashing them if the work is done already."""
    manifest = read_manifest(start)
    return manifest.weights_sha256 if manifest else ""


def _plan_manifest(config: TrainConfig, parent: Parent, precision: str) -> Manifest:
    """The manifest before training; its `work` leaves out paths and settings that cannot change the result."""
    account = data_account(config)
    apart = ("path", "format", "workers", "limit", "validation_rows", "packed_rows")
    data = {key: value for key, value in asdict(config.data).items() if key not in apart}
    data |= held_out.identity(config)
    if config.data.packed_rows is not None:
        data["packed_rows"] = config.data.packed_rows
    sources = [{k: v for k, v in entry.items() if k != "path"} for entry in account["sources"].values()]
    work = {
        "domain": config.domain.name, "data": {**data, "sources": sources}, "optim": _optim(config),
        "seed": config.seed, "precision": precision, "export_dtype": config.export_dtype,
        "backbone": backbone.identity(Path(parent.path)),
    }  # fmt: skip
    kind = "backbone" if config.domain.name == "warmup" and config.out is None else "expert"
    return Manifest(
        kind, config.domain.name, asdict(config), work,
        parents=[parent], data=account, seeds={"seed": config.seed},
    )  # fmt: skip
