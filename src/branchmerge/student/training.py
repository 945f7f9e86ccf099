"""Train one branch: what train.py calls."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar

from branchmerge import machine
from branchmerge.config import TrainConfig
from branchmerge.data.datamodule import Corpus, TrajectoryData, data_account, prepare, read_corpus
from branchmerge.student import attention, backbone
from branchmerge.student.checkpoints import CheckpointFolder
from branchmerge.student.export import export
from branchmerge.student.loggers import make_loggers
from branchmerge.student.module import Student
from branchmerge.student.resume import Resume
from branchmerge.study import Manifest, Study, is_done, locked, parent_of, publish


def check(config: TrainConfig) -> None:
    """Read everything that the branch will read of its data; raises UserError at the first that cannot be used."""
    read_corpus(config)


def train(config: TrainConfig) -> Path:
    """Train the branch that `config` describes and publish its checkpoint; finished work is not done again.

    Returns:
        The folder of the expert (or of the backbone, for domain=warmup).
    """
    rows = read_corpus(config)
    start = backbone.locate(config, config.domain.name)
    device = machine.device_of(config.trainer.accelerator)
    precision = _precision(config.trainer.precision, device)
    folder = _folder(config)
    planned = _plan_manifest(config, start, precision)
    with locked(folder):
        if is_done(folder, planned, config.overwrite):
            print(f"{folder}: done already", flush=True)
            return folder
        print(f"{folder}: training domain {config.domain.name} from {start}", flush=True)
        tokenizer = backbone.load_tokenizer(start)
        backbone.check_tokenizer(tokenizer, start)
        corpus = prepare(config, rows, tokenizer, backbone.context_length(start))
        _tell(corpus)
        saved = CheckpointFolder(_checkpoints(config), planned, config.trainer.checkpoint.keep_last)
        with publish(folder, planned) as partial:
            student, facts = _fit(config, start, device, precision, corpus, saved)
            planned.data = corpus.account
            planned.training = facts
            export(student.model, start, partial, getattr(torch, config.export_dtype))
        saved.remove()
    print(
        f"{folder}: {facts['steps']} steps, {facts['tokens']} tokens, {facts['seconds']:.0f} s,"
        f" {facts['tokens_per_second']:.0f} tokens/s, last loss {facts['last_loss']:.3f}",
        flush=True,
    )
    return folder


def _fit(
    config: TrainConfig, start: Path, device: torch.device, precision: str, corpus: Corpus, saved: CheckpointFolder
) -> tuple[Student, dict[str, Any]]:
    """Load the backbone, train it over the plan, return it with the facts for the manifest.

    Goes on from the last checkpoint that is whole.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(config.seed, workers=True, verbose=False)
    steps = len(corpus.plan.steps)
    begin = saved.newest()
    first_step = begin.step if begin else 0
    if begin is not None:
        print(f"{begin.folder}: going on after step {begin.step} of {steps}", flush=True)
    attn = attention.implementation(config.backbone.attn, device)
    model = backbone.load_model(start, torch.float32, attn)
    if config.trainer.activation_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    student = Student(model, config.optim, steps, config.trainer.max_skipped_steps)
    logs = _logs(config)
    resume = Resume(saved, config.trainer.checkpoint, begin)
    bars = [TQDMProgressBar(refresh_rate=1)] if config.trainer.progress else []
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,  # the plan holds all epochs, one after the other
        accumulate_grad_batches=config.optim.global_batch,
        gradient_clip_val=config.optim.grad_clip or None,
        logger=make_loggers(config, logs, first_step),
        default_root_dir=logs,
        callbacks=[resume, *bars],
        enable_progress_bar=config.trainer.progress,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        deterministic=device.type == "cpu",
        log_every_n_steps=1,
    )
    trainer.fit(student, datamodule=TrajectoryData(corpus, first_step))
    seconds = resume.seconds
    if trainer.interrupted:
        raise KeyboardInterrupt
    last_loss = float(trainer.callback_metrics["loss"])
    facts = {
        "steps": trainer.global_step, "tokens": corpus.tokens, "supervised_tokens": corpus.supervised,
        "seconds": round(seconds, 2), "tokens_per_second": round(corpus.tokens / seconds, 1), "last_loss": last_loss,
        "precision": precision, "attention": attn, "devices": [machine.describe(device)], "logs": str(logs),
    }  # fmt: skip
    return student, facts


def _tell(corpus: Corpus) -> None:
    """Say what became of the rows, before the long work starts."""
    for name, entry in corpus.account["sources"].items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in entry["dropped"].items()) or "none"
        print(
            f"{name}: kept {entry['kept']} of {entry['read']} rows ({entry['unverified']} unverified,"
            f" {entry['truncated']} truncated); dropped: {dropped}",
            flush=True,
        )
    print(f"{len(corpus.plan.steps)} steps, {corpus.tokens} tokens, {corpus.supervised} of them learned", flush=True)


def _folder(config: TrainConfig) -> Path:
    """Where the result belongs."""
    if config.out is not None:
        return Path(config.out).expanduser()
    study = Study(config)
    return study.backbone if config.domain.name == "warmup" else study.expert(config.domain.name)


def _logs(config: TrainConfig) -> Path:
    """Where the training curves go."""
    if config.out is not None:
        out = Path(config.out).expanduser()
        return out.parent / f"{out.name}-logs"
    return Study(config).logs("train", config.domain.name)


def _checkpoints(config: TrainConfig) -> Path:
    """Where checkpoints lie while a branch is in training."""
    if config.out is not None:
        out = Path(config.out).expanduser()
        return out.parent / f"{out.name}-checkpoints"
    return Study(config).checkpoints


def _precision(asked: str, device: torch.device) -> str:
    """Weights stay float32; `auto` computes in bfloat16 where the device is faster at it."""
    if asked != "auto":
        return asked
    return "bf16-mixed" if machine.computes_bf16(device) else "32-true"


def _plan_manifest(config: TrainConfig, start: Path, precision: str) -> Manifest:
    """The manifest as far as it is known before the work; `work` leaves out paths and what cannot change the result."""
    account = data_account(config)
    data = {key: value for key, value in asdict(config.data).items() if key not in ("path", "format")}
    sources = [{k: v for k, v in entry.items() if k != "path"} for entry in account["sources"].values()]
    work = {
        "domain": config.domain.name, "data": {**data, "sources": sources}, "optim": asdict(config.optim),
        "seed": config.seed, "precision": precision, "export_dtype": config.export_dtype,
    }  # fmt: skip
    kind = "backbone" if config.domain.name == "warmup" and config.out is None else "expert"
    return Manifest(
        kind, config.domain.name, asdict(config), work,
        parents=[parent_of(start)], data=account, seeds={"seed": config.seed},
    )  # fmt: skip
