"""Train one branch: what train.py calls."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from branchmerge import machine
from branchmerge.config import TrainConfig
from branchmerge.config_checks import check_groups, check_packages
from branchmerge.data import held_out
from branchmerge.data.datamodule import Corpus, data_account
from branchmerge.data.prepared import prepared
from branchmerge.errors import UserError
from branchmerge.files import writing
from branchmerge.student import agreement, attention, backbone, places, ranks, trials
from branchmerge.student.checkpoints import CheckpointFolder
from branchmerge.student.ending import Ending
from branchmerge.student.export import check_finite, check_room, export, numbers_in
from branchmerge.student.fit import Setup, compute_dtype, fit
from branchmerge.student.forecast import bytes_of_training
from branchmerge.student.preflight import check_shape
from branchmerge.student.sharding import check_weights
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
    start = _backbone(config)
    precision = _precision(config.trainer.precision, device)
    agreement.check_alike(start, precision)
    folder = places.result(config)
    if folder.resolve() == start.resolve():
        raise UserError(f"out={folder}: is the model that the branch starts from; give another out=")
    ranks.by_first(lambda: check_files(config))  # report a mistake before waiting for another run
    _warn_of_unpinned(config)
    with ExitStack() as stack:
        ranks.by_first(lambda: stack.enter_context(locked(folder)))
        known = ranks.by_first(lambda: _known_weights(start))
        parent = Parent(str(start), known or agreement.weights_sha256(start))
        planned = ranks.by_first(
            lambda: _plan_manifest(config, parent, precision)
        )  # not before the lock: files of rows may change while waiting for it
        saved = CheckpointFolder(places.checkpoints(config), planned, config.trainer.checkpoint.keep_last)
        ranks.by_first(lambda: _check_redo(config, folder))
        if ranks.by_first(lambda: is_done(folder, planned, config.overwrite)) and not config.redo:
            ranks.say(f"{folder}: done already")
            saved.remove()  # left by a run that was killed after publishing
            return folder
        ranks.say(f"{folder}: training domain {config.domain.name} from {start}")
        if known:
            agreement.check_fingerprint(start, known)
        setup = Setup(start, device, precision, _attention(config, start, device, precision))
        _check_places(config, start, folder, saved)
        corpus = prepared(config, start, saved.folder / "corpus", ranks.by_first(saved.has_some), planned.data)
        saved.rows = corpus.fingerprint
        _report_rows(corpus)
        ending = stack.enter_context(Ending())
        with publish(folder, planned) if ranks.is_first() else _helping(folder) as partial:
            student, facts = fit(config, setup, corpus, saved, ending)
            planned.data = corpus.account
            planned.training = facts
            check_finite(student.model, f"{folder}: after training")
            planned.weights_sha256 = export(student.model, start, partial, getattr(torch, config.export_dtype))
        saved.remove()
        ranks.wait()  # until the first process has published
        _report_result(folder, facts)
    return folder


def _backbone(config: TrainConfig) -> Path:
    """Folder of the model that the branch starts from; all processes see it, and it can be trained as configured."""
    start = ranks.by_first(lambda: backbone.locate(config, config.domain.name))
    ranks.check_seen(start, "give a backbone.path= on a disk that all nodes share (for one of the hub: share HF_HOME)")
    check_shape(config, backbone.read_config(start))
    return start


def _warn_of_unpinned(config: TrainConfig) -> None:
    for name in unpinned(config):
        ranks.say(
            f"warning: {name}: a dataset of the hub without a revision may change from run to run without a word; set"
            f" study.corpus.{name}.revision=COMMIT"
        )


def _check_places(config: TrainConfig, start: Path, folder: Path, saved: CheckpointFolder) -> None:
    """Check weights, and room on the disks, before rows are graded."""
    ranks.by_first(lambda: check_weights(start, config.trainer.sharded, config.trainer.recomputes))
    ranks.by_first(lambda: check_room(start, folder, getattr(torch, config.export_dtype)))
    ranks.check_shared(saved.folder)
    ranks.by_first(saved.tell_of_others)
    if config.trainer.checkpoint.is_on:
        ranks.by_first(lambda: saved.tell_if_small(bytes_of_training(config) * numbers_in(start)))


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


def _report_rows(corpus: Corpus) -> None:
    """Print how many rows were kept and dropped, before the long work starts."""
    for name, entry in corpus.account["sources"].items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in entry["dropped"].items()) or "none"
        ranks.say(
            f"{name}: kept {entry['kept']} of {entry['read']} rows ({entry['unverified']} unverified,"
            f" {entry['truncated']} truncated); dropped: {dropped}"
        )
    ranks.say(f"{len(corpus.plan.steps)} steps, {corpus.tokens} tokens, {corpus.supervised} of them learned")


def _report_result(folder: Path, facts: dict[str, Any]) -> None:
    loss = "not finite" if facts["last_loss"] is None else f"{facts['last_loss']:.3f}"
    ranks.say(
        f"{folder}: {facts['steps']} steps, {facts['tokens']} tokens, {facts['seconds']:.0f} s,"
        f" {facts['tokens_per_second']:.0f} tokens/s, last loss {loss}"
    )


def _precision(asked: str, device: torch.device) -> str:
    """Lightning's name of the precision, with float32 weights; `auto` is bf16-mixed if the device is faster at it."""
    if asked != "auto":
        return asked
    return "bf16-mixed" if machine.computes_bf16(device) else "32-true"


def _attention(config: TrainConfig, start: Path, device: torch.device, precision: str) -> str:
    """Name of the attention that is configured and works on this device; chosen before any row is graded."""
    compute = compute_dtype(precision)
    attn = attention.implementation(config.backbone.attn, device, compute, config.trainer.context_parallel > 1)
    return trials.choose_attention(attn, backbone.read_config(start), device, compute)


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
