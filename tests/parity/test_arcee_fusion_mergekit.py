"""arcee_fusion_mergekit against mergekit 0.1.5, bit for bit; and how far mergekit's choice is from the exact one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from branchmerge.merge import merge_state_dicts
from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.operators.arcee_fusion_mergekit import ArceeFusionMergekit

GOLDENS = Path(__file__).resolve().parent / "goldens"
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
TENSORS = pytest.mark.parametrize("tensor", ["weight", "norm"])


def golden(dtype: str, tensor: str) -> dict[str, Tensor]:
    """Experts and results of the authors' two steps: science with math, then code with that.

    mergekit's results depend on the vector instructions that torch uses, so there are some for each kind.
    """
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    results = GOLDENS / f"arcee_fusion_{dtype}_{instructions}.safetensors"
    if not results.exists():
        pytest.skip(f"no result of mergekit by torch's {instructions} code; make_goldens.py makes it")
    loaded = load_file(GOLDENS / f"arcee_fusion_{dtype}.safetensors") | load_file(results)
    return {name: loaded[f"{name}.{tensor}"] for name in ("science", "math", "code", "step1", "step2")}


@DTYPES
@TENSORS
def test_both_steps_are_mergekits_bit_for_bit(dtype: str, tensor: str) -> None:
    models = golden(dtype, tensor)
    operator = ArceeFusionMergekit()
    assert torch.equal(operator([models["science"], models["math"]]), models["step1"])
    assert torch.equal(operator([models["code"], models["step1"]]), models["step2"])
    assert not torch.equal(models["step2"], models["code"])


@DTYPES
def test_the_tree_in_one_go_is_the_two_steps(dtype: str) -> None:
    models = {name: {"w": tensor} for name, tensor in golden(dtype, "weight").items()}
    merged = merge_state_dicts(models, ["code", ["science", "math"]], "arcee_fusion_mergekit")
    assert torch.equal(merged["w"], models["step2"]["w"])


@DTYPES
def test_mergekit_takes_largely_other_coordinates_than_the_formula(dtype: str) -> None:
    models = golden(dtype, "weight")
    left, right = models["science"], models["math"]
    exact = ArceeFusion()([left, right]) != left
    theirs = models["step1"] != left
    assert float((exact & theirs).sum() / (exact | theirs).sum()) < 0.5


def test_large_tensors_are_sampled_by_a_seed() -> None:
    generator = torch.Generator().manual_seed(1)
    left = 0.02 * torch.randn(1100, 1000, generator=generator)
    right = left + 3e-4 * torch.randn(1100, 1000, generator=generator)
    results = [ArceeFusionMergekit(seed=seed)([left, right]) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    taken = [float((result != left).double().mean()) for result in results]
    assert taken[2] != taken[0] and taken[2] == pytest.approx(taken[0], rel=0.02)
