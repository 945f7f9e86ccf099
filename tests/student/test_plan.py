"""The plan against arithmetic, against torch's own counts, and against a training that really ran."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Script
from hydra import compose, initialize_config_dir
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from branchmerge import config
from branchmerge.config_checks import typed
from branchmerge.data.batch import make_batch
from branchmerge.data.template import Document
from branchmerge.errors import UserError
from branchmerge.student.flops import Shapes
from branchmerge.student.forecast import Memory, Setting, forecast
from branchmerge.student.plan import GIB, Plan, fits, make_plan
from branchmerge.student.plan_text import told
from branchmerge.student.workload import Workload

PROJECT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 512,
    "max_position_embeddings": 4096,
}  # fmt: skip
MID: dict[str, Any] = {
    **TINY, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "tie_word_embeddings": False,
    "vocab_size": 4096,
}  # fmt: skip
SMALL: dict[str, Any] = {
    **TINY, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 16000, "max_position_embeddings": 8192,
}  # fmt: skip
"""50 million parameters"""
ONE = Setting(MID, world=1, seq_len=512, sharded=False)
SPREAD = [
    Setting(TINY, world=2, seq_len=64), Setting(TINY, world=4, seq_len=64, replicate=2),
    Setting(MID, world=8, seq_len=512, rows=2),
]  # fmt: skip
SHORT, LONG = (Setting(TINY, world=8, seq_len=length) for length in (512, 2048))
LEAN = Setting(TINY, world=8, seq_len=2048, checkpointing=True)
SHARED = Setting(TINY, world=8, seq_len=2048, context=2)
OFFLOADED = Setting(TINY, world=8, seq_len=2048, cpu_offload=True)
ON_CPU = Setting(SMALL, world=1, seq_len=512, sharded=False, bf16=False, gpu=False)
WORDY = {gpu: Setting({**TINY, "vocab_size": 1 << 17}, world=8, seq_len=2048, gpu=gpu) for gpu in (True, False)}
"""More logits than are computed at a time"""
SIMULATED = [ONE, *SPREAD, SHORT, LONG, LEAN, SHARED, OFFLOADED, ON_CPU, *WORDY.values()]
config.register()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, UserError]:
    """Folder of what this file has simulated, and what is said of the last model, which has no such step."""
    folder = tmp_path_factory.mktemp("plans")
    with pytest.raises(UserError) as refused:
        forecast([*SIMULATED, Setting({**TINY, "model_type": "mixtral"}, world=2, seq_len=64)], folder)
    return folder, refused.value


@pytest.fixture(scope="module")
def plans(simulated: tuple[Path, UserError]) -> Path:
    return simulated[0]


def memory(setting: Setting, plans: Path) -> Memory:
    (found,) = forecast([setting], plans)
    return found


@pytest.mark.parametrize("setting", [ONE, *SPREAD])
def test_shares_are_those_of_arithmetic(setting: Setting, plans: Path) -> None:
    found = memory(setting, plans)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**setting.shape))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    # The first device has the largest part of each tensor's rows, and memory comes in blocks of 512 bytes.
    shards = setting.world // setting.replicate
    numbers = [math.ceil(len(p) / shards) * p[0].numel() for p in model.parameters()]
    share = sum(math.ceil(4 * n / 512) * 512 for n in numbers)
    assert found.shares["weights"] == share + 2 * 512  # and frequencies of positions, twice
    assert 4 * sum(numbers) <= found.shares["gradients"] <= share  # FSDP's of a layer lie in one piece
    assert found.shares["optimizer"] == 2 * share + 512 * len(numbers)  # AdamW counts its steps once a tensor


def test_gradients_of_earlier_rows_lie_there_while_the_last_is_computed(plans: Path) -> None:
    found = memory(SPREAD[2], plans)
    assert (found.weights, found.gradients) == (found.shares["weights"], found.shares["gradients"])


def test_activations_grow_with_the_row_and_shrink_when_computed_again(plans: Path) -> None:
    short, long, lean = (memory(setting, plans) for setting in (SHORT, LONG, LEAN))
    assert long.activations == pytest.approx(4 * short.activations, rel=0.05)
    assert lean.total < 0.8 * long.total
    assert lean.shares == long.shares


@pytest.mark.parametrize(("gpu", "logits"), [(True, 1 << 27), (False, 1 << 26)])
def test_logits_take_no_more_than_a_chunk_of_them(plans: Path, gpu: bool, logits: int) -> None:
    """In bfloat16, in float32, and their gradient in bfloat16; beside them, the head's gradient in float32."""
    assert memory(WORDY[gpu], plans).logits == pytest.approx(8 * logits + 4 * 64 * (1 << 17), rel=0.01)


def test_two_devices_that_share_a_row_have_half_its_activations_each(plans: Path) -> None:
    shared, long = memory(SHARED, plans), memory(LONG, plans)
    assert shared.activations == pytest.approx(long.activations / 2, rel=0.1)
    assert shared.shares == long.shares


def test_what_lies_in_the_cpus_memory_is_not_on_the_gpu(plans: Path) -> None:
    found = memory(OFFLOADED, plans)
    assert (found.weights, found.gradients, found.optimizer) == (0, 0, 0)
    assert found.shares == memory(LONG, plans).shares
    assert found.total < memory(LONG, plans).total


@pytest.mark.slow
def test_deep_models_are_reckoned_from_shallow_ones(plans: Path) -> None:
    """All twelve layers simulated, against the line through two shallower models."""
    settings = [
        ONE, SPREAD[2], Setting(MID, world=8, seq_len=512, checkpointing=True),
        Setting(MID, world=32, seq_len=2048, replicate=4, cpu_offload=True),
    ]  # fmt: skip
    program = (
        "import json, sys\n"
        "from dataclasses import asdict\n"
        "from branchmerge.student.simulation import Setting, simulate\n"
        "for asked in json.load(sys.stdin): print(json.dumps(asdict(simulate(Setting(**asked), whole=True))))\n"
    )
    asked = json.dumps([vars(setting) for setting in settings])
    run = subprocess.run([sys.executable, "-c", program], input=asked, capture_output=True, text=True, check=True)
    for setting, line in zip(settings, run.stdout.splitlines(), strict=True):
        whole, reckoned = Memory(**json.loads(line)), memory(setting, plans)
        assert reckoned.total == pytest.approx(whole.total, rel=0.001)
        assert reckoned.shares == whole.shares


@pytest.mark.slow
def test_a_training_that_ran_took_as_much(plans: Path) -> None:
    """Growth of the process: 50 million parameters, a row of 512 tokens, float32 on the CPU."""
    script = Path(__file__).with_name("training_memory.py")
    command = [sys.executable, str(script), json.dumps(ON_CPU.shape), str(ON_CPU.seq_len), "False"]
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=at_once)
    measured, simulated = int(run.stdout), memory(ON_CPU, plans).total
    print(f"measured {measured / GIB:.3f} GiB, simulated {simulated / GIB:.3f}")
    assert simulated == pytest.approx(measured, rel=0.05)


def test_what_was_simulated_is_kept_and_told_apart(plans: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in plans.iterdir()}
    forecast(SIMULATED, plans)
    assert capsys.readouterr().out == ""
    assert {path: path.stat().st_mtime_ns for path in plans.iterdir()} == before
    assert len(before) >= len(SIMULATED)  # more where slow tests have been


def test_a_model_without_a_step_is_told_in_a_line(simulated: tuple[Path, UserError]) -> None:
    assert "cannot be simulated: MixtralForCausalLM has other weights in memory" in str(simulated[1])


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    """Eager attention computes masked pairs too, which are not counted as work: twice the pairs, less the diagonal."""
    shape = {**TINY, "tie_word_embeddings": tied}
    tokens = 48
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, attn_implementation="eager"))
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    found = Shapes.of(model)
    assert found is not None
    work = asdict(found)
    twice = Workload(1, 1, tokens, tokens, [(tokens, 2), (1, -tokens)], "")
    assert counter.get_total_flops() == twice.flops(work)
    row = make_batch([Document("a", np.arange(tokens), 1)], tokens - 1)
    assert Workload(1, 1, tokens, tokens - 1, [(tokens, 1)], "").flops(work) == found.flops_of(row)


def planned(outputs: Path, *overrides: str) -> Plan:
    few = ["planning.devices=[2]", "planning.seq_lens=[128]", "planning.reserve_gib=0", "study.seq_len=512"]
    shape = [f"backbone.shape.{key}={json.dumps(value)}" for key, value in TINY.items()]
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        given = ["plan=true", "study=tinyr1_1_5b", f"outputs={outputs}", *few, *shape, *overrides]
        return make_plan(typed(compose("train", overrides=given), config.TrainConfig))


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A plan of a tiny model on one GPU, and its folder of outputs."""
    outputs = tmp_path_factory.mktemp("outputs")
    return outputs, planned(outputs, "planning.card_gib=1")


def test_a_plan_tells_steps_tokens_time_and_cost(roomy: tuple[Path, Plan]) -> None:
    plan = roomy[1]
    assert plan.asked.fits and not plan.advice and plan.work is not None
    # 93,733 trajectories of half a row each, five times; 96 rows a step
    assert (plan.work.rows, plan.work.steps) == (234_335, math.ceil(234_335 / 96))
    assert plan.work.tokens == 234_335 * 512
    # A row of two documents of half its length: per token 6 FLOPs for each weight of a product (two layers' and the
    # head's), per pair of tokens that see each other 12 for each of the heads' 4 x 16 numbers of a layer.
    matrices = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128) + 512 * 64
    pairs = 2 * 256 * 257 / 2
    flops = 234_335 * (6 * 512 * matrices + 12 * 2 * 64 * pairs)
    assert plan.work.flops(plan.asked.memory.work) == pytest.approx(flops, rel=1e-6)
    assert plan.asked.hours == pytest.approx(plan.work.flops(plan.asked.memory.work) / (0.4 * 989e12) / 3600)
    by_devices = {option.setting.world: option for option in plan.by_devices}
    assert by_devices[2].hours == pytest.approx((plan.asked.hours or 0) / 2)
    assert by_devices[2].gpu_hours == pytest.approx(plan.asked.gpu_hours)
    assert [option.setting.seq_len for option in plan.by_length] == [128, 512]
    text = told(plan)
    assert "fits." in text and "2,441 steps" in text and "half a packed row" in text
    by_length = text.partition("By length of a row, on 1 GPU:")[2].split("Note:")[0]
    for option in plan.by_length:
        assert re.search(rf"\| +{option.setting.seq_len} \|.* {option.memory.total / 2**30:.1f} \| +yes \|", by_length)


def test_work_is_what_the_study_expects_and_the_steps_allow(roomy: tuple[Path, Plan]) -> None:
    short = planned(roomy[0], "planning.card_gib=1", "study.expected.math.tokens=128").work
    assert short is not None and (short.rows, short.tokens) == (117_170, 117_170 * 512)
    assert short.documents == [(128, pytest.approx(117_170 * 4))]
    few = planned(roomy[0], "planning.card_gib=1", "optim.max_steps=10").work
    assert few is not None and (few.steps, few.rows, few.tokens) == (10, 960, 960 * 512)


def test_what_is_held_in_reserve_must_fit_too(plans: Path) -> None:
    found = memory(ONE, plans)
    need = found.total / GIB
    assert fits(found, config.PlanningConfig(card_gib=need + 4.01, reserve_gib=4))
    assert not fits(found, config.PlanningConfig(card_gib=need + 3.99, reserve_gib=4))


def test_cost_and_disk_are_told(roomy: tuple[Path, Plan]) -> None:
    """Of all GPUs together, and as much as there is at the worst moment: the last checkpoints and the new one."""
    plan = planned(roomy[0], "planning.card_gib=1", "trainer.devices=2", "planning.tflops=0.001", "planning.price=3")
    assert plan.asked.hours is not None and plan.asked.hours > 10
    assert f"cost {plan.asked.hours * 2 * 3:,.0f} at 3 an hour" in told(plan)
    large = replace(plan.asked, memory=replace(plan.asked.memory, parameters=32_000_000_000))
    assert plan.config.trainer.checkpoint.keep_last == 2
    said = "64.00 GB for the expert; up to 3 checkpoints of 384.00 GB at once"
    assert said in told(replace(plan, asked=large))


def test_a_card_is_as_fast_as_its_name_says_or_the_user(roomy: tuple[Path, Plan]) -> None:
    assert "at 40% of 312 TFLOP/s" in told(planned(roomy[0], "planning.card_gib=1", "planning.card=A100 SXM"))
    assert "at 40% of 5 TFLOP/s" in told(
        planned(roomy[0], "planning.card_gib=1", "planning.card=TPU", "planning.tflops=5")
    )
    with pytest.raises(UserError, match=r"planning.card=TPU: how fast it is is not known here; give planning.tflops="):
        planned(roomy[0], "planning.card=TPU")


@pytest.mark.slow
def test_a_member_of_a_multirun_has_gpus_of_its_own(roomy: tuple[Path, Plan]) -> None:
    assert planned(roomy[0], "trainer.gpus_per_job=2").asked.setting.world == 2


def test_devices_that_cannot_share_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 devices make no such groups; use a multiple of 2"):
        planned(tmp_path, "trainer.devices=3", "trainer.context_parallel=2")
    with pytest.raises(UserError, match="num_attention_heads=4 and num_key_value_heads=2 cannot be dealt out"):
        planned(tmp_path, "trainer.devices=4", "trainer.context_parallel=4")


@pytest.mark.slow
def test_devices_that_share_rows_take_as_long_and_are_told(roomy: tuple[Path, Plan]) -> None:
    outputs, plan = roomy
    shared = planned(outputs, "trainer.devices=2", "trainer.context_parallel=2")
    alone = {option.setting.world: option for option in plan.by_devices}[2]
    assert shared.asked.hours == pytest.approx(alone.hours)
    assert shared.asked.setting.rows == 96 and alone.setting.rows == 48
    assert "2 share every row" in told(shared)


@pytest.mark.slow
def test_a_plan_that_does_not_fit_names_what_makes_it_fit(roomy: tuple[Path, Plan]) -> None:
    """A card that holds the step only with activations computed again, or with a shorter row."""
    outputs, plan = roomy
    needs = {option.setting.seq_len: option.memory.total for option in plan.by_length}
    lean = planned(outputs, "planning.card_gib=1", "trainer.activation_checkpointing=true").asked.memory.total
    assert lean < needs[512]
    size = (max(lean, needs[128]) + needs[512]) / 2 / GIB
    tight = planned(outputs, f"planning.card_gib={size}")
    assert not tight.asked.fits
    changes = [advice.change for advice in tight.advice]
    assert "trainer.activation_checkpointing=true" in changes and "data.seq_len=128" in changes
    assert "trainer.activation_checkpointing=true and optim.optimizer=adamw_8bit" not in changes  # one change will do
    assert all(advice.option.fits for advice in tight.advice)
    assert "DOES NOT FIT" in told(tight) and "What makes it fit:" in told(tight)


@pytest.mark.slow
def test_moments_in_8_bits_take_a_quarter(roomy: tuple[Path, Plan]) -> None:
    outputs, plan = roomy
    small = planned(outputs, "optim.optimizer=adamw_8bit").asked.memory
    usual = plan.asked.memory
    assert small.optimizer == pytest.approx(usual.optimizer * 2.03125 / 8, rel=1e-6)
    assert small.total == usual.total - usual.optimizer + small.optimizer
    size = (small.total + usual.total) / 2 / GIB
    assert "optim.optimizer=adamw_8bit" in [a.change for a in planned(outputs, f"planning.card_gib={size}").advice]


@pytest.mark.slow
def test_rows_that_are_here_are_counted(tiny_student: Path, tmp_path: Path) -> None:
    search = f"hydra.searchpath=[file://{PROJECT}/tests/conf]"
    few = [
        "planning.devices=[1]",
        "planning.seq_lens=[256]",
        "trainer=cpu",
        "trainer.progress=false",
        "data.verify=false",
    ]
    given = ["plan=true", "study=tiny", f"outputs={tmp_path}", f"backbone.path={tiny_student}", *few]
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        asked = typed(compose("train", overrides=[search, *given]), config.TrainConfig)
    plan = make_plan(asked)
    assert plan.work is not None and plan.work.steps == 3 and plan.work.rows == 6
    assert plan.work.learned < plan.work.tokens <= 6 * 256
    assert make_plan(asked).work == plan.work
    text = told(plan)
    assert f"model     {tiny_student}, " in text and "1 process of 80 GiB (on a CPU)" in text
    assert "each process has 2" in text and "set them to this CPU's" in text and "GPU hours" not in text


@pytest.mark.slow
def test_the_command_line(script: Script, tmp_path: Path) -> None:
    shape = [f"backbone.shape.{key}={value}" for key, value in (("num_hidden_layers", 2), ("intermediate_size", 512))]
    command = [
        "plan=true", "study=tinyr1_32b", "trainer.devices=8", "trainer.num_nodes=4", f"outputs={tmp_path}", *shape,
        "planning.devices=[64]", "planning.seq_lens=[16384]", "planning.card_gib=800",
    ]  # fmt: skip
    run = script("train", *command)
    assert run.returncode == 0, run.stderr
    assert "32 GPUs of 800 GiB" in run.stdout and "hours" in run.stdout and "|   64 |" in run.stdout
    assert not (tmp_path / "tinyr1_32b" / "experts").exists()


@pytest.mark.slow
def test_the_32b_student_takes_what_torchs_own_tracker_found(tmp_path: Path) -> None:
    """FSDPMemTracker's peaks for Qwen2.5-32B, 16,384 tokens, recomputed activations, one row a step."""
    shape = {
        "model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    settings = [Setting(shape, world=world, seq_len=16384, checkpointing=True) for world in (8, 32, 64)]
    found = forecast(settings, tmp_path)
    assert [memory.parameters for memory in found] == [32_763_876_352] * 3
    assert [memory.total / GIB for memory in found] == pytest.approx([75.3, 36.4, 30.7], rel=0.01)
