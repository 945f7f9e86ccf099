"""Format a plan as text and tables."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from branchmerge.student.forecast import KINDS, bytes_of_training
from branchmerge.student.plan import GIB, Option, Plan

WIDTH = 200


def told(plan: Plan) -> str:
    """The plan as text, with tables in Markdown."""
    config, asked = plan.config, plan.asked
    card = config.planning
    verdict = "fits" if asked.fits else "DOES NOT FIT"
    need, device = asked.memory.total / GIB, asked.setting.device
    lines = [
        f"Plan of study {config.study.name}, domain {config.domain.name}: {verdict}.",
        f"  model     {config.backbone.path or config.backbone.name}, {asked.memory.parameters:,} parameters",
        f"  machine   {_machine(plan)}",
        f"  step      {config.optim.global_batch} rows of {asked.setting.seq_len:,} tokens; each {device} has"
        f" {asked.setting.rows}, one after the other",
        f"  memory    {need:.1f} GiB a {device} and {card.reserve_gib:g} in reserve, of {card.card_gib:g}"
        + _host(asked, config.trainer.num_nodes),
        f"  disk      {_disk(plan)}",
        *_work(plan),
        "",
        f"By number of {asked.setting.devices}, at {asked.setting.seq_len:,} tokens"
        f" (GiB a {device} at the peak of a step):",
        _table(plan, plan.by_devices, by_devices=True),
        f"By length of a row, on {_devices(asked)}:",
        _table(plan, plan.by_length, by_devices=False),
        *_advice(plan),
        *(f"Note: {note}." for note in plan.notes),
    ]
    return "\n".join(lines)


def _devices(option: Option) -> str:
    setting = option.setting
    return f"{setting.world} {setting.devices if setting.world > 1 else setting.device}"


def _machine(plan: Plan) -> str:
    setting, card = plan.asked.setting, plan.config.planning
    how = [
        "sharded (FSDP2)" if setting.sharded else "one device",
        f"{setting.replicate} whole sets" if setting.replicate > 1 else "",
        f"{setting.context} share every row" if setting.context > 1 else "",
        "weights and moments in the CPU's memory" if setting.cpu_offload else "",
        "products in bfloat16" if setting.bf16 else "products in float32",
        "activations computed again" if setting.checkpointing else "activations kept",
    ]
    where = f"{_devices(plan.asked)} of {card.card_gib:g} GiB ({card.card if setting.gpu else 'on a CPU'})"
    return ", ".join([where, *(word for word in how if word)])


def _host(option: Option, nodes: int) -> str:
    if not option.setting.cpu_offload:
        return ""
    held, setting = sum(option.memory.shares.values()) / GIB, option.setting
    return f"; {held:.1f} GiB of the CPU's memory a {setting.device}, {held * setting.world / nodes:.0f} a node"


def _disk(plan: Plan) -> str:
    config, numbers = plan.config, plan.asked.memory.parameters
    stored = 2 if config.export_dtype == "bfloat16" else 4
    expert = f"{stored * numbers / 1e9:,.2f} GB for the expert"
    if not config.trainer.checkpoint.is_on:
        return expert
    most = config.trainer.checkpoint.keep_last + 1
    return f"{expert}; up to {most} checkpoints of {bytes_of_training(config) * numbers / 1e9:,.2f} GB at once"


def _work(plan: Plan) -> list[str]:
    work, asked, card = plan.work, plan.asked, plan.config.planning
    if work is None:
        return ["  work      not known, see below"]
    counted = f"  work      {work.steps:,} steps, {work.rows:,} rows, {work.tokens:,} tokens"
    if asked.hours is None or asked.gpu_hours is None:
        return [
            counted,
            "  time      not known: the model is more than matrices and attention, whose FLOPs are counted",
        ]
    return [
        f"{counted}, {work.flops(asked.memory.work):.3g} FLOPs",
        f"  time      {asked.hours:,.1f} hours, {asked.gpu_hours:,.0f} {asked.setting.device} hours"
        f" at {card.mfu:.0%} of {card.tflops:g} TFLOP/s;"
        f" cost {asked.gpu_hours * card.price:,.0f} at {card.price:g} an hour",
    ]


def _table(plan: Plan, options: Sequence[Option], by_devices: bool) -> str:
    table = Table(box=box.MARKDOWN)
    by = plan.asked.setting.devices if by_devices else "tokens"
    with_time = by_devices and any(option.hours is not None for option in options)
    heads = [by, *(("rows",) if by_devices else ()), *KINDS, "peak", "fits"]
    for head in [*heads, *(("hours", f"{plan.asked.setting.device} hours", "cost") if with_time else ())]:
        table.add_column(head, justify="right", no_wrap=True)
    for option in options:
        setting, memory = option.setting, option.memory
        first = [f"{setting.world}", f"{setting.rows}"] if by_devices else [f"{setting.seq_len:,}"]
        sizes = [f"{getattr(memory, kind) / GIB:.1f}" for kind in KINDS]
        row = [*first, *sizes, f"{memory.total / GIB:.1f}", "yes" if option.fits else "no"]
        if with_time:
            hours, gpu_hours = option.hours or 0.0, option.gpu_hours or 0.0
            row += [f"{hours:,.1f}", f"{gpu_hours:,.0f}", f"{gpu_hours * plan.config.planning.price:,.0f}"]
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


def _advice(plan: Plan) -> list[str]:
    if plan.asked.fits:
        return []
    if not plan.advice:
        setting = plan.asked.setting
        offload = "the CPU's memory, " if setting.gpu else ""
        return [
            f"Nothing tried makes it fit: neither recomputed activations, {offload}more {setting.devices} nor shorter"
            " rows."
        ]
    return (
        ["What makes it fit:"]
        + [f"  {advice.change}: {advice.option.memory.total / GIB:.1f} GiB" for advice in plan.advice]
        + [""]
    )
