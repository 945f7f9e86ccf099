"""The training itself: a student, Lightning's Trainer around it, and the facts that the manifest tells of it."""

import logging
import math
import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer, seed_everything

from branchmerge import machine
from branchmerge.config import TrainConfig
from branchmerge.data.datamodule import Corpus, TrajectoryData
from branchmerge.student import backbone, places, ranks
from branchmerge.student.bf16_products import products_in_float32
from branchmerge.student.checkpoints import CheckpointFolder
from branchmerge.student.context_parallel import ContextGroup, rows_of
from branchmerge.student.ending import Ending
from branchmerge.student.loggers import claim, loggers_of
from branchmerge.student.loss import PackedLoss
from branchmerge.student.module import Student
from branchmerge.student.resume import EndWhenTold, Resume
from branchmerge.student.sharding import Sharding, Spread, check_shardable, compile_layers, load_weights, shard
from branchmerge.student.step_rows import StepRows
from branchmerge.student.stored import empty_model
from branchmerge.student.watch import watchers


@dataclass(frozen=True)
class Setup:
    """What a branch starts from, and how this machine computes it."""

    start: Path
    """Folder of the backbone"""
    device: torch.device
    precision: str
    """Lightning's name: 32-true or bf16-mixed; the weights are float32 in both"""
    attn: str
    """Name of the attention in transformers' registry"""

    @property
    def compute(self) -> torch.dtype:
        """dtype of the matrix products"""
        return compute_dtype(self.precision)


def compute_dtype(precision: str) -> torch.dtype:
    """dtype of the matrix products for Lightning's name of a precision."""
    return torch.bfloat16 if precision == "bf16-mixed" else torch.float32


def fit(
    config: TrainConfig, setup: Setup, corpus: Corpus, saved: CheckpointFolder, ending: Ending
) -> tuple[Student, dict[str, Any]]:
    """Train the backbone over the steps of the corpus's plan, from the newest complete checkpoint on.

    Returns:
        The trained student, and the facts for the manifest.
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
    student = _student(config, setup, steps, context)
    logs = places.logs(config)
    run = {
        "attention": setup.attn,
        "torch": torch.__version__,
        "devices": ranks.from_all(machine.describe(setup.device)),
    }
    resume = Resume(saved, config.trainer.checkpoint, begin, run)
    callbacks = [
        resume,
        *watchers(config, corpus, setup.start, logs, ending),
        EndWhenTold(resume, ending),
        StepRows(config.data.seq_len),
    ]
    with ExitStack() as during:
        ranks.by_first(lambda: claim(logs, saved.folder.name))
        loggers = during.enter_context(loggers_of(config, logs, first_step)) if ranks.is_first() else False
        trainer = Trainer(
            **_devices(config, setup),
            max_epochs=1,  # the plan contains all epochs, in order
            accumulate_grad_batches=_rows_of_each(config, shares),
            gradient_clip_val=config.optim.grad_clip or None,
            logger=loggers,
            default_root_dir=logs,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            deterministic=setup.device.type == "cpu",
            log_every_n_steps=1,
        )
        data = TrajectoryData(corpus, first_step, share, shares, config.data.workers, setup.device.type == "cuda")
        during.enter_context(_products(setup))
        _run(trainer, student, data)
    student.tell_if_broken_at_the_end()
    return student, _facts(trainer, student, corpus, resume) | {"precision": setup.precision, "logs": str(logs)}


def _run(trainer: Trainer, student: Student, data: LightningDataModule) -> None:
    """trainer.fit, with Ctrl-C as KeyboardInterrupt; the Trainer turns it into a silent exit status of 1."""
    try:
        trainer.fit(student, datamodule=data)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from end
        raise


def _facts(trainer: Trainer, student: Student, corpus: Corpus, resume: Resume) -> dict[str, Any]:
    """What the manifest tells of the training; `seconds` are those of all runs that made the branch."""
    seconds = resume.seconds
    last_loss = float(trainer.callback_metrics["loss"])  # not finite if that step was skipped
    return {
        "steps": trainer.global_step, "skipped_steps": student.skipped,
        "tokens": corpus.tokens, "supervised_tokens": corpus.supervised,
        "seconds": round(seconds, 2), "tokens_per_second": round(corpus.tokens / seconds, 1),
        "last_loss": last_loss if math.isfinite(last_loss) else None,
        "runs": resume.runs,
    }  # fmt: skip


def _student(config: TrainConfig, setup: Setup, steps: int, context: ContextGroup | None) -> Student:
    """The student; its weights are loaded already if it is on one device, and later if it is sharded."""
    trainer, start, spread = config.trainer, setup.start, None
    with backbone.loading(start):
        model = (
            empty_model(start, setup.attn) if trainer.sharded else backbone.load_model(start, torch.float32, setup.attn)
        )
    if trainer.sharded:
        check_shardable(model)
        sharding = Sharding(setup.compute, trainer.replicate, trainer.cpu_offload)

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
    return Student(packed, config.optim, steps, trainer.max_skipped_steps, spread, setup.compute, fused)


def _devices(config: TrainConfig, setup: Setup) -> dict[str, Any]:
    """The Trainer's arguments about devices and precision."""
    accelerator = "gpu" if setup.device.type == "cuda" else "cpu"
    if not config.trainer.sharded:
        return {"accelerator": accelerator, "devices": 1, "precision": setup.precision}
    nodes = config.trainer.num_nodes
    # FSDP sets the dtype of the products; autocast on top of it would cast twice.
    return {
        "accelerator": accelerator, "devices": ranks.world() // nodes, "num_nodes": nodes, "precision": "32-true",
        "strategy": Spread(ranks.world()), "plugins": [ranks.environment()],
    }  # fmt: skip


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


def _products(setup: Setup) -> AbstractContextManager[None]:
    """A context that computes bfloat16 products in float32 on a CPU without instructions for bfloat16, if needed."""
    slow = setup.compute == torch.bfloat16 and setup.device.type == "cpu" and not machine.computes_bf16(setup.device)
    return products_in_float32() if slow else nullcontext()
