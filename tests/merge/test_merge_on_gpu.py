"""The same merges with the arithmetic on a GPU; skipped where there is none (benchmarks/cuda_checks.sh runs them)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import NESTED, load, perturbed, recipe
from torch import Tensor

from branchmerge.merge import merge
from branchmerge.merge.operators import OPERATORS, Operator, make_operator
from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.operators.quartiles import threshold

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
FUSIONS = [
    ("arcee_fusion", {}),
    ("arcee_fusion", {"kl": "tensor", "direction": "left_right"}),
    ("arcee_fusion", {"delta": "signed", "gate": "gt"}),
    ("arcee_fusion", {"precision": "float64"}),
    ("arcee_fusion_paper", {}),
]
SUMMING = sorted(name for name in OPERATORS if not name.startswith("arcee_fusion"))


def experts(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """A backbone and three fine-tunes of it."""
    draw = torch.Generator().manual_seed(7)
    backbone = 0.02 * torch.randn(shape, generator=draw)
    tuned = [backbone + 3e-4 * torch.randn(shape, generator=draw) for _ in range(3)]
    return [tensor.to(dtype) for tensor in (backbone, *tuned)]


def on(device: str, operator: Operator, models: list[Tensor], base: Tensor) -> Tensor:
    made = operator([model.to(device) for model in models], base.to(device))
    assert made.device.type == device
    return made.cpu()


@DTYPES
@pytest.mark.parametrize("shape", [(700, 513), (9000,), (3, 5)], ids=str)
@pytest.mark.parametrize(("name", "parameters"), FUSIONS, ids=str)
def test_both_devices_choose_the_same_but_at_the_threshold(
    name: str, parameters: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    base, *models = experts(dtype, *shape)
    operator = make_operator(name, parameters)
    assert isinstance(operator, ArceeFusion)
    here, there = (on(device, operator, models[:2], base) for device in ("cpu", "cuda"))
    assert there.dtype == dtype
    left, right = (model.double().reshape(-1, shape[-1]) for model in models[:2])
    measured = replace(operator, precision="float64").measure([left, right])
    d = left - right
    S = torch.from_numpy(measured.factors.copy())[:, None] * (d if operator.delta == "signed" else d.abs())
    T = threshold(measured.quartiles, operator.lam)
    # Of bfloat16 models many scores may lie at the threshold; with one KL for all they compare exactly.
    assert torch.equal(here, there) or not (measured.common and dtype == torch.bfloat16)
    near = ((S - T).abs() <= 1e-5 * abs(T)).reshape(shape)
    assert not bool(((here != there) & ~near).any())
    assert torch.equal(there[~near], torch.where((S >= T).reshape(shape), models[1], models[0])[~near])


@pytest.mark.parametrize("by", ["random", "delta", "kl"])
def test_the_null_controls_take_as_many_on_a_gpu(by: str) -> None:
    base, *models = experts(torch.float32, 700, 513)
    here, there = (
        on(device, make_operator("arcee_fusion_null", {"by": by}), models[:2], base) for device in ("cpu", "cuda")
    )
    assert not torch.equal(there, models[0])
    assert int((here != there).sum()) <= 2e-4 * here.numel()


@DTYPES
@pytest.mark.parametrize("name", SUMMING)
def test_sums_are_the_same_on_both_devices(name: str, dtype: torch.dtype) -> None:
    base, *models = experts(dtype, 300, 257)
    operator = make_operator(name, {})
    here, there = (on(device, operator, models[: 3 if operator.n_way else 2], base) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-8)


@DTYPES
def test_mergekits_arithmetic_takes_every_value_from_a_model(dtype: torch.dtype) -> None:
    base, *models = experts(dtype, 300, 257)
    left, right = models[:2]
    made = on("cuda", make_operator("arcee_fusion_mergekit", {}), models[:2], base)
    assert bool(((made == left) | (made == left + (right - left))).all())
    assert 0.0 < float((made != left).double().mean()) < 0.5


def test_checkpoints_merged_on_a_gpu(tiny_student: Path, tmp_path: Path) -> None:
    folders = {
        name: perturbed(tiny_student, tmp_path / name, seed) for seed, name in enumerate(("code", "science", "math"))
    }
    made = {}
    for device in ("cpu", "cuda"):
        merge(recipe(folders, tmp_path / device / "merged", tree=NESTED, device=device))
        made[device] = load(tmp_path / device / "merged")
    told = (tmp_path / "cuda" / "merged" / "recipe.yaml").read_text()
    assert "# Makes this model again, on a GPU of the same kind" in told and "device: cuda" in told
    differing = sum(int((made["cpu"][name] != tensor).sum()) for name, tensor in made["cuda"].items())
    assert differing <= 2e-4 * sum(tensor.numel() for tensor in made["cpu"].values())
