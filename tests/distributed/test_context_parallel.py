"""Rows that several devices share (FSDP2 over gloo) train what one device trains that has them whole."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from branches import branch, metrics
from conftest import make_student
from spreading import FSDP, alone, assert_equal_to, run_groups

from branchmerge.errors import UserError
from branchmerge.student.attention import by_formula
from branchmerge.student.backbone import check_heads
from branchmerge.student.context_parallel import RowParts
from branchmerge.study import read_manifest

SETTINGS = ("domain=math", "data.seq_len=250", "optim.epochs=2", "optim.warmup_ratio=0.0", "optim.global_batch=4")
PAIRS, FOURS = ("trainer.context_parallel=2",), ("trainer.context_parallel=4",)
SHAPES = {
    "llama": {}, "gemma2": {"head_dim": 16, "sliding_window": 24}, "mistral": {"sliding_window": 24},
    "qwen2": {"num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip
WATCHED = ("data.validation_rows=7", "trainer.validate_every_n_steps=2", "trainer.sample_every_n_steps=2")
MIXED = ("trainer.precision=bf16-mixed", "export_dtype=float32")
WAYS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    **{kind: (kind, 2, PAIRS) for kind in SHAPES},
    "a group of four": ("qwen2", 4, FOURS),
    "two pairs and copies": ("llama", 4, (*PAIRS, "trainer.replicate=2", "data.workers=1")),
    "kept activations": ("llama", 2, (*PAIRS, "trainer.activation_checkpointing=false")),
    "watched": ("llama", 2, (*PAIRS, *WATCHED)),
    "bf16": ("llama", 2, (*PAIRS, *MIXED)),
}
"""Kind of model, number of processes, settings"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Long prompts and short answers too: a device may have a part of a row in which nothing is learned."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(24):
            said = [" ".join(f"word{j}" for j in range(n)) for n in ((30 + i, 1) if i % 2 else (2, 20 + i))]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]
            file.write(json.dumps({"id": f"row-{i}", "messages": turns}) + "\n")
    return f"data.path={path}"


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    return {kind: make_student(folder / kind, model_type=kind, **shape) for kind, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def shared(students: dict[str, Path], rows: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of processes train together; a folder of outputs for each way."""
    folder = tmp_path_factory.mktemp("shared")
    groups: dict[tuple[str, int], dict[Path, tuple[str, ...]]] = {("torchrun", n): {} for n in (2, 4)}
    for name, (kind, processes, settings) in WAYS.items():
        data = () if name == "watched" else (rows,)
        started = (*SETTINGS, *data, f"backbone.path={students[kind]}", *settings)
        groups["torchrun", processes][folder / name] = started
    run_groups(students["llama"], groups)
    return folder


@pytest.mark.parametrize("name", [name for name in WAYS if name not in ("watched", "bf16")])
def test_sharing_rows_does_not_change_a_branch(
    name: str, students: dict[str, Path], rows: str, shared: Path, tmp_path: Path
) -> None:
    alone(students[WAYS[name][0]], tmp_path, *SETTINGS, rows)
    assert_equal_to(tmp_path, shared / name)
    ours, theirs = (metrics(outputs, "math") for outputs in (shared / name, tmp_path))
    for column in ("rows", "padding_share", "supervised_tokens"):
        assert [float(row[column]) for row in ours] == [float(row[column]) for row in theirs], column


def test_rows_are_validated_on_together(students: dict[str, Path], shared: Path, tmp_path: Path) -> None:
    alone(students["llama"], tmp_path, *SETTINGS, *WATCHED)
    for column in ("val_loss/math", "val_loss/code", "val_loss/science", "loss"):
        ours, theirs = (
            [(row["step"], float(row[column])) for row in metrics(outputs, "math") if row[column]]
            for outputs in (shared / "watched", tmp_path)
        )
        assert [step for step, _ in ours] == [step for step, _ in theirs] and len(ours) == 3
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=1e-5)
    samples = [(o / "tiny/logs/train/math/samples.jsonl").read_text() for o in (shared / "watched", tmp_path)]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == 3


def test_products_may_be_bfloat16(students: dict[str, Path], rows: str, shared: Path, tmp_path: Path) -> None:
    alone(students["llama"], tmp_path, *SETTINGS, rows, *MIXED)
    found, expected = ([float(row["loss"]) for row in metrics(o, "math")] for o in (shared / "bf16", tmp_path))
    assert found == pytest.approx(expected, rel=2e-2) and found != pytest.approx(expected, rel=1e-6)
    manifest = read_manifest(shared / "bf16" / "tiny" / "experts" / "math")
    assert manifest is not None and manifest.config["trainer"]["context_parallel"] == 2


def test_what_cannot_be_shared_is_refused(students: dict[str, Path], tmp_path: Path) -> None:
    told = "num_attention_heads=4 and num_key_value_heads=2 cannot be dealt out to so many devices"
    with pytest.raises(UserError, match=told):
        check_heads(json.loads((students["llama"] / "config.json").read_text()), 4)
    check_heads({"n_head": 4}, 1)
    with pytest.raises(UserError, match="num_attention_heads=None"):
        check_heads({"n_head": 4}, 2)
    for overrides, said in [
        (("backbone.attn=flash_attention_2",), "takes torch's own"),
        (("trainer.devices=3",), "3 devices make no such groups; use a multiple of 2"),
    ]:
        with pytest.raises(UserError, match=said):
            branch(students["llama"], tmp_path, *FSDP, *PAIRS, *overrides)
    with pytest.raises(UserError, match="is a training on one device"):
        branch(students["llama"], tmp_path, "trainer.strategy=single", *PAIRS)
    with pytest.raises(UserError, match="1 devices make no such groups; use a multiple of 2"):
        alone(students["llama"], tmp_path, *FSDP, *PAIRS)


def test_attention_that_is_compiled_keeps_its_gradient() -> None:
    """As FlexAttention is on CUDA; torch's own exchange gives tensors that lose it there."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert dist.group.WORLD is not None
        parts = RowParts(dist.group.WORLD, (20,), 0)
        attend = torch.compile(by_formula, backend="aot_eager")
        gradients = []
        for shared in (False, True):
            draw = torch.Generator().manual_seed(0)
            given = [torch.randn(1, 2, 20, 8, generator=draw).requires_grad_() for _ in range(3)]
            result = attend(*(parts.some_heads(*given) if shared else given))
            gradients.append(torch.autograd.grad(result.square().sum(), given))
        torch.testing.assert_close(gradients[1], gradients[0])
    finally:
        dist.destroy_process_group()
