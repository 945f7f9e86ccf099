"""Training on a GPU; skipped where there is none (benchmarks/cuda_checks.sh runs it)."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from branches import PROJECT, branch, free_port, metrics
from conftest import Script, make_student
from lightning.fabric.utilities import move_data_to_device
from spreading import alone, assert_equal_to, wish
from test_attention import MODELS, documents, everywhere, heads

from branchmerge.data.batch import Batch, make_batch
from branchmerge.student import attention, flash, flash4, trials
from branchmerge.student.backbone import load_model
from branchmerge.student.checkpoints import generators, load_state, save_state
from branchmerge.student.chunked_loss import _add_product
from branchmerge.student.loss import packed_logits
from branchmerge.student.module import Student
from branchmerge.student.training import train
from branchmerge.study import read_manifest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


FLASH4 = pytest.mark.skipif(not flash4.is_installed(), reason="flash-attn-4 is not installed")


@pytest.mark.parametrize(
    ("model_type", "attn", "dtype"),
    [
        *product(["llama", "qwen2", "mistral", "gemma2"], [attention.PACKED_SDPA], [torch.bfloat16, torch.float32]),
        pytest.param("qwen3", attention.PACKED_FLASH[4], torch.bfloat16, marks=FLASH4),
    ],
    ids=str,
)
def test_packed_attention_on_a_gpu_is_that_of_the_documents_alone(
    model_type: str, attn: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    wide = {"head_dim": 64} if attn == attention.PACKED_FLASH[4] else {}  # the tiny models' heads of 8 are too small
    folder = make_student(tmp_path / model_type, model_type=model_type, **MODELS.get(model_type, {}), **wide)
    model = load_model(folder, dtype, attn).eval().to("cuda")
    plain = load_model(folder, torch.float32, "eager").eval()
    packed = make_batch(documents(), 1)
    with torch.no_grad():
        there = move_data_to_device(packed, torch.device("cuda"))
        together = packed_logits(model, there, everywhere(packed).to("cuda")).float().cpu()
        alone = torch.cat([plain(torch.tensor(document.tokens)[None]).logits[0] for document in documents()])
    error = float((together - alone).norm() / alone.norm())
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_flex_attention_has_the_gradients_of_the_formula() -> None:
    bounds = torch.tensor([0, 7, 50], dtype=torch.int32)
    grads = {}
    for device in ("cpu", "cuda"):
        q, k, v = (tensor.to(device).detach().requires_grad_() for tensor in heads(50))
        out, _ = attention.packed_sdpa(
            torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds.to(device), max_length_q=43,
            sliding_window=9, softcap=2.0,
        )  # fmt: skip
        out.square().sum().backward()
        grads[device] = [tensor.grad.cpu() for tensor in (q, k, v) if tensor.grad is not None]
    assert len(grads["cuda"]) == 3
    for found, expected in zip(grads["cuda"], grads["cpu"], strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(("size", "of_values"), [(24, 16), (320, 320), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_heads_that_flash_attention_is_not_made_for(size: int, of_values: int, dtype: torch.dtype) -> None:
    draw, lengths = torch.Generator().manual_seed(0), (7, 43)
    made = [torch.randn(1, n, 50, width, generator=draw) for n, width in ((4, size), (2, size), (2, of_values))]
    bounds = torch.tensor([0, 7, 50], dtype=torch.int32, device="cuda")
    q, k, v = (tensor.to("cuda", dtype) for tensor in made)
    found, _ = attention.packed_sdpa(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, max_length_q=43)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in made), strict=True)
    expected = torch.cat([attention.by_formula(*part) for part in parts], dim=2).transpose(1, 2)
    error = float((found.float().cpu() - expected).norm() / expected.norm())
    assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_heads_gradient_is_added_up_in_float32() -> None:
    total = torch.randn(3000, 96, device="cuda")
    a, b = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((500, 3000), (500, 96)))
    expected = total.double() + a.T.double() @ b.double()
    _add_product(total, a.T, b)
    assert float((total - expected).norm() / expected.norm()) < 1e-5  # 1.7e-3 where the product is rounded before


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("limits", [{}, {"sliding_window": 4096}, {"attn_logit_softcapping": 50.0}], ids=str)
def test_older_flash_attention_gives_result_and_gradients_of_the_formula(version: int, limits: dict[str, Any]) -> None:
    if not flash.is_installed(version):
        pytest.skip(f"FlashAttention {version} is not installed")
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, **limits}
    assert trials._why_not_flash(version, shape, torch.device("cuda"), torch.bfloat16) == ""


@FLASH4
@pytest.mark.parametrize("size", [64, 128])
def test_flash_attention_4_gives_result_and_gradients_of_the_formula(size: int) -> None:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": size}
    assert trials._why_not_flash(4, shape, torch.device("cuda"), torch.bfloat16) == ""


def test_a_branch_on_a_gpu_has_the_losses_of_one_on_the_cpu(tiny_student: Path, tmp_path: Path) -> None:
    losses = {}
    for device, trainer in (("cpu", "cpu"), ("cuda", "gpu")):
        train(branch(tiny_student, tmp_path / device, "domain=math", f"trainer={trainer}", "trainer.precision=32-true"))
        losses[device] = [float(row["loss"]) for row in metrics(tmp_path / device, "math")]
    assert len(losses["cpu"]) == 3
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-5)


@pytest.mark.parametrize("more", [(), ("trainer.cpu_offload=true",), ("trainer.compile=true",)], ids=str)
def test_fsdp_on_a_gpu_has_the_losses_of_the_cpu(
    more: tuple[str, ...], script: Script, tiny_student: Path, tmp_path: Path
) -> None:
    """By torchrun and NCCL, of one process."""
    train(branch(tiny_student, tmp_path / "cpu", "domain=math", "trainer=cpu", "trainer.precision=32-true"))
    here = ("--config-dir", "tests/conf", "study=tiny", f"backbone.path={tiny_student}", f"outputs={tmp_path / 'fsdp'}")
    spread = ("trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=1", "trainer.precision=32-true")
    done = script("train", *here, "domain=math", *spread, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = ([float(row["loss"]) for row in metrics(tmp_path / where, "math")] for where in ("fsdp", "cpu"))
    assert found == pytest.approx(expected, rel=1e-4)


TOGETHER: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"shards": (), "offloaded": ("trainer.cpu_offload=true",), "copies": ("trainer.replicate=2",),
        "shared rows": ("trainer.context_parallel=2",)},
    4: {"copies of shards": ("trainer.replicate=2",),
        "copies of pairs": ("trainer.replicate=2", "trainer.context_parallel=2")},
}  # fmt: skip
"""Ways of spreading a branch, by the number of processes"""


@pytest.mark.parametrize("nodes", TOGETHER)
def test_nodes_of_one_gpu_each_train_what_it_trains_alone(nodes: int, tiny_student: Path, tmp_path: Path) -> None:
    """By NCCL over sockets; it is told that the processes are on hosts of their own, as here they share the GPU."""
    settings = ("domain=math", "data.seq_len=250", "optim.epochs=2", "optim.global_batch=4", "trainer.accelerator=gpu",
                "trainer.precision=32-true", "export_dtype=float32")  # fmt: skip
    there = (*settings, "trainer.devices=1", f"trainer.num_nodes={nodes}")
    wanted = {tmp_path / name: (*there, *way) for name, way in TOGETHER[nodes].items()}
    told = {"WORLD_SIZE": nodes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "nodes", "NCCL_SOCKET_IFNAME": "lo"}  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, *wish(tiny_student, wanted)], cwd=PROJECT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **{k: str(v) for k, v in told.items()}, "RANK": str(node), "GROUP_RANK": str(node),
                 "NCCL_HOSTID": f"node{node}"},
        )
        for node in range(nodes)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0] for process in running]
    assert not any(process.returncode for process in running), said
    alone(tiny_student, tmp_path / "alone", *settings, "trainer=gpu")
    for outputs in wanted:
        assert_equal_to(tmp_path / "alone", outputs)


def test_the_memory_that_is_told_is_not_that_of_a_branch_before(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.empty(4 << 30, dtype=torch.uint8, device="cuda")  # and gone again
    train(branch(tiny_student, tmp_path, "domain=math", "trainer=gpu", "trainer.progress=true"))
    peaks = re.findall(r"  (\d+\.\d) GiB  MFU", capsys.readouterr().out)
    assert peaks and max(map(float, peaks)) < 1


def test_members_of_a_multirun_take_turns_on_one_gpu(script: Script, tiny_student: Path, tmp_path: Path) -> None:
    here = ("--config-dir", "tests/conf", "study=tiny", f"backbone.path={tiny_student}", f"outputs={tmp_path}")
    each = ("trainer=fsdp", "trainer.accelerator=gpu", "trainer.gpus_per_job=1", "optim.max_steps=2")
    done = script("train", "-m", *here, "domain=math,code", *each)
    assert done.returncode == 0, done.stdout + done.stderr
    for domain in ("math", "code"):
        manifest = read_manifest(tmp_path / "tiny" / "experts" / domain)
        assert manifest is not None and manifest.training["steps"] == 2


def test_a_gpus_generator_comes_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    save_state(tmp_path, model, optimizer, generators())
    expected = torch.rand(3, device="cuda")
    load_state(tmp_path, model, optimizer)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_branch_goes_on_on_a_gpu(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("trainer=gpu", "trainer.precision=32-true", "trainer.checkpoint.every_n_steps=1", "data.workers=1")
    start = Student.on_train_batch_start

    def fail(self: Student, batch: Batch, index: int) -> None:
        start(self, batch, index)
        if self.trainer.global_step == 2:
            raise RuntimeError("as if killed")

    train(branch(tiny_student, tmp_path / "whole", "domain=math", *more))
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="as if killed"):
        broken.setattr(Student, "on_train_batch_start", fail)
        train(branch(tiny_student, tmp_path / "killed", "domain=math", *more))
    train(branch(tiny_student, tmp_path / "killed", "domain=math", *more))
    whole, killed = (metrics(tmp_path / name, "math") for name in ("whole", "killed"))
    assert [row["step"] for row in killed] == [row["step"] for row in whole]
    assert [float(row["loss"]) for row in killed] == pytest.approx([float(row["loss"]) for row in whole], rel=1e-6)


def test_bf16_trains_on_a_gpu(tiny_student: Path, tmp_path: Path) -> None:
    quiet = ("trainer=gpu", "trainer.precision=bf16-mixed", "optim.lr=1e-3", "optim.epochs=3")
    train(branch(tiny_student, tmp_path, "domain=math", *quiet))
    losses = [float(row["loss"]) for row in metrics(tmp_path, "math")]
    assert losses[-1] < losses[0] - 0.05


@FLASH4
def test_layers_compile_whole_with_flash_attention_4(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student", model_type="qwen3", head_dim=64)
    losses = []
    torch._dynamo.utils.counters.clear()
    for attn, compiled in (("sdpa", False), ("flash_attention_4", True)):
        more = (f"backbone.attn={attn}", f"trainer.compile={compiled}", "trainer.precision=bf16-mixed")
        train(branch(student, tmp_path / attn, "domain=math", "trainer=gpu", *more))
        losses.append([float(row["loss"]) for row in metrics(tmp_path / attn, "math")])
    manifest = read_manifest(tmp_path / "flash_attention_4" / "tiny" / "experts" / "math")
    assert manifest is not None and manifest.training["runs"][-1]["attention"] == attention.PACKED_FLASH[4]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"], counters["graph_break"]


@pytest.mark.parametrize("way", ["trainer.compile=true", "backbone.loss=liger"])
def test_a_faster_way_has_the_losses_of_the_plain_one(way: str, tiny_student: Path, tmp_path: Path) -> None:
    if "liger" in way:
        pytest.importorskip("liger_kernel")
    losses = []
    for name, changed in (("plain", ()), ("faster", (way,))):
        train(
            branch(tiny_student, tmp_path / name, "domain=math", "trainer=gpu", "trainer.precision=32-true", *changed)
        )
        losses.append([float(row["loss"]) for row in metrics(tmp_path / name, "math")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
