"""Predict the memory, time and cost of a branch before it is trained: `python train.py plan=true ...`.

Needs no weights, downloads or GPU: memory is simulated (`forecast.py`), work is counted (`workload.py`).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from branchmerge import machine
from branchmerge.config import PlanningConfig, TrainConfig
from branchmerge.config_checks import check_groups, check_trainer
from branchmerge.errors import UserError
from branchmerge.student import backbone
from branchmerge.student.flops import peak_of
from branchmerge.student.forecast import Memory, Setting, forecast
from branchmerge.student.workload import Workload, workload

GIB = 2**30
GPUS_OF_A_NODE = 8
"""Assumed if trainer.devices is not set"""


@dataclass(frozen=True)
class Option:
    """One way to train, and the memory and time that it takes."""

    setting: Setting
    memory: Memory
    fits: bool
    hours: float | None
    """None if the work is not known"""

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.setting.world


@dataclass(frozen=True)
class Advice:
    """A change that makes a branch fit."""

    change: str
    """As words for the command line"""
    option: Option


@dataclass(frozen=True)
class Plan:
    config: TrainConfig
    asked: Option
    by_devices: list[Option]
    by_length: list[Option]
    advice: list[Advice]
    work: Workload | None
    notes: list[str]


def make_plan(config: TrainConfig) -> Plan:
    """Plan the configuration as it is, with other numbers of devices, and with other lengths of rows."""
    config = replace(config, planning=replace(config.planning, tflops=_tflops(config.planning)))
    folder = Path(config.outputs).expanduser() / "plans"
    checkpoint = backbone.find(config)
    shape, notes = _shape(config, checkpoint)
    backbone.check_heads(shape, config.trainer.context_parallel)
    world, said = _world(config)
    check_groups(config.trainer, world)
    work = workload(config, checkpoint, folder)
    asked = _setting(config, shape, world)
    worlds = sorted({*config.planning.devices, world})
    lengths = sorted({*config.planning.seq_lens, asked.seq_len})
    settings = [asked]
    settings += [_on(asked, other, config) for other in worlds]
    settings += [replace(asked, seq_len=length) for length in lengths]
    options = _options(settings, config, work, folder)
    asked_option, by_devices, by_length = options[0], options[1 : 1 + len(worlds)], options[1 + len(worlds) :]
    advice = [] if asked_option.fits else _advice(config, asked, worlds, lengths, work, folder)
    notes += [*said, *_notes(config, asked, worlds, work)]
    return Plan(config, asked_option, by_devices, by_length, advice, work, notes)


def _tflops(card: PlanningConfig) -> float:
    """The card's speed in TFLOP/s."""
    if card.tflops is not None:
        return card.tflops
    peak = peak_of(card.card)
    if peak is None:
        raise UserError(
            f"planning.card={card.card}: how fast it is is not known here; give planning.tflops= of its dense bfloat16"
            " products (and its planning.card_gib=)"
        )
    return peak / 1e12


def _shape(config: TrainConfig, checkpoint: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The model's config (the checkpoint's if it is on this machine, else that of conf/backbone), and notes on it."""
    shape = backbone.shape_of(config, checkpoint)
    if shape:
        source = f"backbone.shape of {config.backbone.name}" if checkpoint is None else f"that of {checkpoint}"
        return shape, [f"the model's shape is {source}"]
    path = config.backbone.path
    if path is None:
        raise UserError(
            f"plan=true: {config.backbone.pretrained} is not on this machine, and backbone={config.backbone.name} has"
            " no shape; set backbone.path=/folder/of/a/model or backbone.shape"
        )
    if Path(path).expanduser().is_dir():
        backbone.check_checkpoint(Path(path).expanduser())  # raises an error that says what the folder lacks
    raise UserError(f"plan=true: backbone.path={path} is not on this machine; give a folder, or download the model")


def _world(config: TrainConfig) -> tuple[int, list[str]]:
    """Number of devices, and notes on what was assumed for it."""
    trainer = config.trainer
    if not trainer.sharded:
        check_trainer(trainer)  # refuses several devices without sharding
        return 1, []
    of_a_node = trainer.gpus_per_job or trainer.devices
    if of_a_node is not None:
        return of_a_node * trainer.num_nodes, []
    if trainer.accelerator == "cpu":
        return trainer.num_nodes, []
    said = f"trainer.devices=null: {GPUS_OF_A_NODE} GPUs a node are assumed"
    return GPUS_OF_A_NODE * trainer.num_nodes, [said]


def _setting(config: TrainConfig, shape: dict[str, Any], world: int) -> Setting:
    trainer = config.trainer
    gpu = trainer.accelerator != "cpu"
    return Setting(
        shape=shape,
        world=world,
        seq_len=config.data.seq_len,
        rows=_rows(config, world, trainer.context_parallel),
        sharded=trainer.sharded,
        replicate=trainer.replicate,
        context=trainer.context_parallel,
        cpu_offload=trainer.cpu_offload and gpu,  # a CPU has no other memory
        checkpointing=trainer.recomputes,
        bf16=trainer.precision == "bf16-mixed"
        or (trainer.precision == "auto" and (gpu or machine.cpu_computes_bf16())),
        eight_bit=config.optim.optimizer == "adamw_8bit",
        gpu=gpu,
    )


def _rows(config: TrainConfig, world: int, context: int) -> int:
    """Packed rows of a device in a step, rounded up; the last devices may have fewer."""
    return math.ceil(config.optim.global_batch / (world // context))


def _can_be_cut(setting: Setting, world: int) -> bool:
    """Whether `world` devices divide into groups that share a row, and into replicas."""
    return world % setting.context == 0 and world % setting.replicate == 0


def _on(setting: Setting, world: int, config: TrainConfig) -> Setting:
    """The setting on another number of devices."""
    replicate = setting.replicate if world % setting.replicate == 0 else 1
    context = setting.context if world % setting.context == 0 else 1
    sharded = world > 1 or setting.sharded
    recomputed = setting.checkpointing or (sharded and config.trainer.activation_checkpointing is None)
    return replace(
        setting, world=world, rows=_rows(config, world, context), replicate=replicate, context=context,
        sharded=sharded, checkpointing=recomputed,
    )  # fmt: skip


def _options(settings: Iterable[Setting], config: TrainConfig, work: Workload | None, folder: Path) -> list[Option]:
    # From two rows on, memory does not depend on the number of rows.
    settings = list(settings)
    memories = forecast([replace(setting, rows=min(setting.rows, 2)) for setting in settings], folder)
    return [
        Option(setting, memory, fits(memory, config.planning), hours(setting, memory, config, work))
        for setting, memory in zip(settings, memories, strict=True)
    ]


def fits(memory: Memory, card: PlanningConfig) -> bool:
    return memory.total / GIB + card.reserve_gib <= card.card_gib


def hours(setting: Setting, memory: Memory, config: TrainConfig, work: Workload | None) -> float | None:
    """Hours of training; in each step, all devices wait for the one with the most rows. None if the work is unknown."""
    if work is None or not memory.work:
        return None
    row = work.flops(memory.work) / work.rows
    in_turn = work.rows / config.optim.global_batch * setting.rows / setting.context
    return in_turn * row / (config.planning.mfu * _tflops(config.planning) * 1e12) / 3600


def _advice(
    config: TrainConfig,
    asked: Setting,
    worlds: list[int],
    lengths: list[int],
    work: Workload | None,
    folder: Path,
) -> list[Advice]:
    """Single changes that make the branch fit; if there are none, those that do so with recomputed activations."""

    def tried(base: Setting, prefix: str) -> list[Advice]:
        return [
            advice
            for change, settings in _changes(config, base, worlds, lengths)
            if (advice := _first_that_fits(prefix, change, settings)) is not None
        ]

    def _first_that_fits(prefix: str, change: Callable[[Setting], str], settings: list[Setting]) -> Advice | None:
        options = _options(settings, config, work, folder)
        found = next((option for option in options if option.fits), None)
        return None if found is None else Advice(prefix + change(found.setting), found)

    found = tried(asked, "")
    if not found and not asked.checkpointing:
        found = tried(replace(asked, checkpointing=True), "trainer.activation_checkpointing=true and ")
    return found


def _changes(
    config: TrainConfig, base: Setting, worlds: list[int], lengths: list[int]
) -> list[tuple[Callable[[Setting], str], list[Setting]]]:
    """For each option that may help: a function that words a change, and the changed settings, mildest first."""
    more = [_on(base, world, config) for world in worlds if world > base.world and _can_be_cut(base, world)]
    shorter = [replace(base, seq_len=length) for length in reversed(lengths) if length < base.seq_len]
    knobs: list[tuple[Callable[[Setting], str], list[Setting]]] = []
    if not base.checkpointing:
        on = [replace(base, checkpointing=True)]
        knobs.append((lambda _: "trainer.activation_checkpointing=true", on))
    fewer = [replace(base, replicate=sets) for sets in range(base.replicate - 1, 0, -1) if base.replicate % sets == 0]
    knobs.append((lambda setting: f"trainer.replicate={setting.replicate}", fewer))
    if base.gpu and not base.cpu_offload:
        alone = "" if base.sharded else f" {_launch(config, base.world)}"
        offloaded = _on(replace(base, cpu_offload=True, sharded=True), base.world, config)
        knobs.append((lambda _: f"trainer.cpu_offload=true{alone}", [offloaded]))
    if not base.eight_bit and not base.cpu_offload:
        knobs.append((lambda _: "optim.optimizer=adamw_8bit", [replace(base, eight_bit=True)]))
    shared = [
        replace(base, context=size, rows=_rows(config, base.world, size))
        for size in (2, 4, 8)
        if size > base.context and base.world % size == 0 and backbone.can_share(base.shape, size)
    ]
    if config.backbone.attn in ("auto", "sdpa"):  # flash-attn does not support shared rows
        knobs.append((lambda setting: f"trainer.context_parallel={setting.context}", shared))
    knobs.append((lambda setting: f"{setting.world} {setting.devices} ({_launch(config, setting.world)})", more))
    knobs.append((lambda setting: f"data.seq_len={setting.seq_len}", shorter))
    return [(said, settings) for said, settings in knobs if settings]


def _launch(config: TrainConfig, world: int) -> str:
    """Options for `world` devices; not trainer=fsdp, which may replace another group and its trainer.accelerator."""
    a_node = config.trainer.devices or GPUS_OF_A_NODE
    if world % a_node:
        a_node = GPUS_OF_A_NODE if world % GPUS_OF_A_NODE == 0 else world
    apart = "" if config.trainer.gpus_per_job is None else " trainer.gpus_per_job=null"
    return f"trainer.strategy=fsdp trainer.devices={a_node} trainer.num_nodes={world // a_node}{apart}"


def _notes(config: TrainConfig, asked: Setting, worlds: list[int], work: Workload | None) -> list[str]:
    """Notes on the assumptions behind the numbers."""
    notes = []
    try:
        check_trainer(config.trainer)
        backbone.check_rows(asked.shape, config.data.seq_len)
    except UserError as error:
        notes.append(f"training would be refused: {error}")
    if work is None:
        parts = ", ".join(config.domain.parts)
        notes.append(
            f"steps and time are not known: the rows or the backbone's tokenizer are not here, and study.expected says"
            f" nothing of {parts}"
        )
    else:
        notes.append(work.said)
    context = asked.context
    refused = [world for world in worlds if not _can_be_cut(asked, world)]
    if refused:
        told = f"{', '.join(map(str, refused))} {asked.devices}"
        notes.append(f"training refuses {told}, which cannot be cut into such groups")
    shared = [world for world in worlds if world not in refused]
    uneven = [world for world in shared if config.optim.global_batch % (world // context)]
    if uneven:
        notes.append(
            f"{', '.join(map(str, uneven))} {asked.devices} cannot share steps of {config.optim.global_batch} rows"
            " equally, so some of them wait"
        )
    if asked.cpu_offload:
        notes.append("the time is without what goes between the CPU's memory and the GPU's, which may take longer")
    if not asked.gpu:
        notes.append("planning.card_gib, tflops, mfu and price are a GPU's; set them to this CPU's")
    if asked.gpu:
        notes.append("activations are FlashAttention's: its result and a number for each head and token")
    if asked.eight_bit:
        notes.append("moments in 8 bits are reckoned from those in float32, not simulated")
    if config.trainer.compile:
        notes.append("trainer.compile is not simulated: it needs less memory than is told here")
    return notes
