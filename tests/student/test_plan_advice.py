"""What a plan advises, assumes and refuses. A step's memory is by hand here; test_plan.py is about the simulated."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_plan import TINY, planned

from branchmerge import machine
from branchmerge.errors import UserError
from branchmerge.student import forecast
from branchmerge.student.flops import Shapes
from branchmerge.student.forecast import Memory, Setting
from branchmerge.student.plan import GIB, hours
from branchmerge.student.plan_text import told
from branchmerge.student.workload import Workload


def by_hand(settings: Sequence[Setting], folder: Path) -> list[Memory]:
    """16 bytes for each of 1,000,000 parameters over the devices of a set, and activations."""
    return [
        Memory(
            0 if one.cpu_offload else 16_000_000 * one.replicate // (one.world if one.sharded else 1), 0, 0, 0,
            (1_000 if one.checkpointing else 10_000) * one.seq_len // one.context, 0,
            shares={"weights": 0, "gradients": 0, "optimizer": 0},
        )
        for one in settings
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def without_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("branchmerge.student.plan.forecast", by_hand)


@pytest.mark.parametrize(
    ("given", "mib", "told_of"),
    [
        (["trainer=gpu"], 15, "trainer.cpu_offload=true "),
        (["trainer=gpu", "trainer.strategy=single"], 15, "2 GPUs"),
        (["trainer=cpu", "planning.devices=[8]"], 12, "8 processes"),
        (["trainer.devices=2", "trainer.replicate=2"], 10, "trainer.replicate=1"),
        (["trainer.devices=2", "trainer.replicate=2", "planning.devices=[3,8]"], 10, "8 GPUs"),
        (["trainer.devices=2", "trainer.activation_checkpointing=false"], 11, "trainer.context_parallel=2"),
    ],
)
def test_what_is_advised_makes_it_fit_where_it_is_done(
    given: list[str], mib: int, told_of: str, tmp_path: Path
) -> None:
    """Every advice is followed: written behind the command that it is about."""
    command = [f"planning.card_gib={mib / 1024}", *given]
    plan = planned(tmp_path, *command)
    assert not plan.asked.fits and any(told_of in advice.change for advice in plan.advice)
    for advice in plan.advice:
        inside = re.search(r"\((.*)\)", advice.change)
        change = (inside.group(1) if inside else advice.change.replace(" and ", " ")).split()
        followed = planned(tmp_path, *command, *change)
        assert followed.asked.fits and followed.asked.setting == advice.option.setting


def test_nothing_is_advised_that_training_refuses_or_that_saves_nothing(tmp_path: Path) -> None:
    """Rows shared with a flash-attn of one's choice; a CPU's memory in place of a CPU's."""
    command = ["planning.card_gib=0.01", "trainer.devices=2", "trainer.activation_checkpointing=false"]
    plan = planned(tmp_path, *command, "backbone.attn=flash_attention_2")
    assert plan.advice and not [advice for advice in plan.advice if "context_parallel" in advice.change]
    on_cpu = [*command, "trainer.accelerator=cpu"]
    assert not [advice for advice in planned(tmp_path, *on_cpu).advice if "cpu_offload" in advice.change]
    assert not planned(tmp_path, *on_cpu, "trainer.cpu_offload=true").asked.setting.cpu_offload


def test_one_device_that_is_told_to_be_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices=2: trainer\.strategy=single is a training on one device"):
        planned(tmp_path, "trainer.strategy=single", "trainer.devices=2", "trainer.context_parallel=2")


@pytest.mark.parametrize("has_instructions", [True, False])
def test_a_cpus_products_are_those_that_train(
    has_instructions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_bf16"} if has_instructions else set())
    assert planned(tmp_path, "trainer=cpu").asked.setting.bf16 == has_instructions
    assert machine.computes_bf16(torch.device("cpu")) == has_instructions


def test_a_folder_that_is_no_model_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json in it"):
        planned(tmp_path, f"backbone.path={tmp_path}")
    with pytest.raises(UserError, match=r"backbone\.path=/no/such is not on this machine; give a folder"):
        planned(tmp_path, "backbone.path=/no/such")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(UserError, match="no weights at all"):
        planned(tmp_path, f"backbone.path={tmp_path}")


def test_steps_are_told_of_a_model_whose_flops_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(planned(tmp_path))
    assert "2,441 steps" in text and "time      not known: the model is more than matrices and attention" in text


def test_devices_that_share_a_row_take_as_long_as_those_that_do_not(tmp_path: Path) -> None:
    """They have twice the rows of each, and half of each row."""
    settings = planned(tmp_path, "trainer.devices=4").config
    work = Workload(10, 960, 960 * 512, 960 * 512, [(512, 960)], "")
    shapes = asdict(Shapes(matrices=1000, head=100, attended=10))
    memory = Memory(0, 0, 0, 0, 0, 0, work=shapes)
    flops = 960 * (6 * 1100 * 512 + 12 * 10 * 512 * 513 / 2)
    for context in (1, 2, 4):
        setting = Setting(TINY, world=4, seq_len=512, context=context, rows=96 // (4 // context))
        # 40% of 989 TFLOP/s on each of four
        assert hours(setting, memory, settings, work) == pytest.approx(flops / 4 / (0.4 * 989e12) / 3600)


def test_the_cpus_memory_is_told_for_a_node_of_several(tmp_path: Path) -> None:
    given = ["trainer.devices=4", "trainer.num_nodes=2", "trainer.cpu_offload=true"]
    plan = planned(tmp_path, *given)
    shares = {"weights": 3 * GIB, "gradients": 3 * GIB, "optimizer": 6 * GIB}
    held = replace(plan, asked=replace(plan.asked, memory=replace(plan.asked.memory, shares=shares)))
    assert "; 12.0 GiB of the CPU's memory a GPU, 48 a node" in told(held)


def test_simulations_of_other_code_or_packages_are_not_those_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(TINY, world=2, seq_len=64)
    keys = [forecast._key(setting), forecast._key(replace(setting, rows=2))]
    with monkeypatch.context() as patched:
        patched.setattr(forecast, "version", lambda name: "99" if name == "torch" else "1")
        keys.append(forecast._key(setting))
        patched.setattr(forecast, "version", lambda name: "99" if name == "transformers" else "1")
        keys.append(forecast._key(setting))
    monkeypatch.setattr(forecast, "DECIDING", forecast.DECIDING[1:])
    keys.append(forecast._key(setting))
    assert len(set(keys)) == 5


def test_moments_in_8_bits_are_a_byte_and_a_scale_for_256() -> None:
    """AdamW has two of them for each number, in float32 of four bytes."""
    shares = {"weights": 4096, "gradients": 4096, "optimizer": 8192}
    found = forecast._in_8_bits(Memory(4096, 4096, 8192, 0, 0, 0, shares=shares))
    assert found.optimizer == found.shares["optimizer"] == 2 * (1024 + 4 * 1024 // 256)
    assert found.total == 4096 + 4096 + 2080
