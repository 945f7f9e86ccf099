"""Every operator against mergekit 0.1.5: the same inputs give the same outputs, up to rounding in the merge's dtype.

make_goldens.py made the goldens. Arcee Fusion is compared bit for bit in test_arcee_fusion_mergekit.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from branchmerge.merge.operators import OPERATORS, Operator, make_operator
from branchmerge.merge.operators.task_vectors import magnitude

GOLDENS = Path(__file__).resolve().parent / "goldens"
NAMES = sorted(name for name in OPERATORS if not name.startswith("arcee_fusion"))
CASES = {name: json.loads((GOLDENS / f"{name}.json").read_text()) for name in NAMES}
OUR_NAME = {"lambda": "lam", "normalize_weights": "normalize"}
TENSORS = ("weight", "norm", "odd")
RESCALED = [(name, "rescaled") for name in ("dare_linear", "dare_ties", "della")]
COMPARED = [(name, case) for name in NAMES for case in CASES[name] if (name, case) not in RESCALED]
COMPUTED_IN_BF16 = {"karcher": 2, "multislerp": 3}
"""mergekit computes in the merge's dtype; here rounded coefficients of bfloat16 move its result by so many units."""


def ours(name: str, case: str, **changes: Any) -> Operator:
    """The operator that a golden's mergekit configuration asks for."""
    config = CASES[name][case]["config"]
    own = [model["parameters"] for model in config["models"]]
    parameters = {OUR_NAME.get(key, key): value for key, value in config["parameters"].items()}
    for theirs, key in {"weight": "weights", "density": "density", "gamma": "gamma", "epsilon": "epsilon"}.items():
        if theirs in own[0]:
            values = [model[theirs] for model in own]
            parameters[key] = values[0] if key == "epsilon" else values
    if name in ("nuslerp", "multislerp"):
        parameters["from_base"] = "base_model" in config
    return make_operator(name, {**parameters, **changes})


def tensors(name: str, case: str, tensor: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Models, backbone and mergekit's result."""
    golden = CASES[name][case]
    inputs = load_file(GOLDENS / f"inputs_{golden['inputs']}.safetensors")
    models = [inputs[f"{model}.{tensor}"] for model in "abc"[: len(golden["config"]["models"])]]
    return models, inputs[f"base.{tensor}"], load_file(GOLDENS / f"{name}.safetensors")[f"{case}.{tensor}"]


def assert_same(name: str, merged: Tensor, golden: Tensor, inputs: list[Tensor]) -> None:
    if golden.dtype == torch.float32:
        torch.testing.assert_close(merged, golden, rtol=2e-6, atol=1e-6)
        return
    # A unit in the last place of the largest number that went into a coordinate: sums of models cancel.
    largest = torch.stack([golden, *inputs]).float().abs().amax(0)
    unit = 2.0 ** (torch.floor(torch.log2(largest.clamp_min(1e-30))) - 7)
    assert ((merged.bfloat16().float() - golden.float()).abs() / unit).max() <= COMPUTED_IN_BF16.get(name, 1)


@pytest.mark.parametrize(("name", "case"), COMPARED)
def test_same_as_mergekit(name: str, case: str) -> None:
    operator = ours(name, case)
    for tensor in TENSORS:
        models, base, golden = tensors(name, case, tensor)
        measured = operator.measure(models, base)
        merged = operator.apply(measured, models, base)
        if case in ("bf16_sparse", "bf16") and name in ("ties", "breadcrumbs"):
            # Which of equal magnitudes are kept is nobody's: leave out coordinates at a limit.
            limits = [found if isinstance(found, list) else [found] for found in measured]
            tied = torch.zeros_like(base, dtype=torch.bool)
            for model, found in zip(models, limits, strict=True):
                for limit in found:
                    tied |= magnitude(model.double() - base.double()) == limit.value
            assert not tied.all()
            merged, golden = torch.where(tied, 0, merged), torch.where(tied, 0, golden)
        assert_same(name, merged, golden, [base, *models])


@pytest.mark.parametrize(("name", "case"), RESCALED)
def test_rescaling_of_mergekit_keeps_the_l1_norm_of_the_draw_where_ours_keeps_the_expectation(
    name: str, case: str
) -> None:
    plain = ours(name, case, rescale=False)
    kept_by = ours(name, case, rescale=False, weights=1, normalize=False, lam=1)
    config = CASES[name][case]["config"]
    for tensor in TENSORS:
        models, base, golden = tensors(name, case, tensor)
        # Each model's own share of the draw: all others put where they change nothing, at the backbone.
        scales = []
        for i, model in enumerate(models):
            alone = [model if j == i else base for j in range(len(models))]
            kept = kept_by(alone, base) - base
            scales.append(float((model - base).abs().sum() / kept.abs().sum()))
        weights = [own["parameters"]["weight"] * s for own, s in zip(config["models"], scales, strict=True)]
        merged = ours(name, case, rescale=False, weights=weights)(models, base)
        torch.testing.assert_close(merged, golden, rtol=1e-5, atol=2e-6)
        assert not torch.allclose(plain(models, base), golden, atol=1e-4)


def test_the_golden_draw_is_fair() -> None:
    """Kept entries of mergekit's draw number as many as a binomial lets expect."""
    models, base, golden = tensors("dare_linear", "one", "weight")
    changed = models[0] != base
    n, kept = int(changed.sum()), int(((golden != base) & changed).sum())
    assert abs(kept - 0.5 * n) < 4 * (n * 0.25) ** 0.5
