"""One tensor of a tree: what a draw depends on, the dtype in which a backbone counts, what is told of the change."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from merging import FLAT, load, perturbed, recipe
from torch import Tensor

from branchmerge.merge import merge
from branchmerge.merge.arrays import as_array, as_tensor
from branchmerge.merge.fold import Facts, TensorFold
from branchmerge.merge.operators import Operator, make_operator
from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.merge.tree import parse
from branchmerge.study import read_manifest


def folded(operator: Operator, name: str, models: dict[str, Tensor], base: Tensor | None = None) -> Tensor:
    origin = None if base is None else as_array(base)
    fold = TensorFold(name, lambda leaf: as_array(models[leaf]), origin)
    return as_tensor(fold.merge(parse(list(models)), operator))


def test_each_tensor_each_tree_and_each_seed_has_a_draw_of_its_own() -> None:
    """By the digest that stands here: other numbers would make other models from the same recipes."""
    draw = torch.Generator().manual_seed(1)
    base, *tuned = (torch.randn(20, 50, generator=draw) for _ in range(3))
    seen = set()
    for names, tensor, seed in (("ab", "w", 7), ("ab", "v", 7), ("ab", "w", 8), ("ac", "w", 7)):
        models = dict(zip(names, tuned, strict=True))
        operator = make_operator("dare_linear", {"density": 0.5, "seed": seed})
        found = folded(operator, tensor, models, base)
        digest = hashlib.sha256(f"{seed}/{tensor}/{names[0]}+{names[1]}".encode()).digest()
        own = replace(operator, seed=int.from_bytes(digest[:6], "big"))  # type: ignore[call-arg]
        assert torch.equal(found, own(tuned, base))
        seen.add(found.numpy().tobytes())
    assert len(seen) == 4


@pytest.mark.parametrize("nested", [False, True])
def test_a_backbone_of_more_digits_than_its_models_is_not_rounded(nested: bool) -> None:
    """Else the task vectors would hold the rounding of the backbone."""
    draw = torch.Generator().manual_seed(2)
    base = torch.randn(30, 40, generator=draw)
    models = {name: (base + 0.1 * torch.randn(30, 40, generator=draw)).bfloat16() for name in "abc"}
    assert not torch.equal(base, base.bfloat16().float())
    operator = make_operator("task_arithmetic", {})
    fold = TensorFold("w", lambda leaf: as_array(models[leaf]), as_array(base))
    found = as_tensor(fold.merge(parse(["a", ["b", "c"]] if nested else ["a", "b", "c"]), operator))
    expected = base.double() + sum(model.double() - base.double() for model in models.values())
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1500), (40, 30), (7000,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("equal", "lam"), [(0.0, 0.5), (0.9, 0.5), (0.9, 0.0)])
def test_the_change_that_arcee_fusion_tells_is_that_of_the_weights(
    shape: tuple[int, ...], dtype: torch.dtype, equal: float, lam: float
) -> None:
    """Also where most values are equal: then T = 0, which they all reach, and taking them changes nothing."""
    draw = torch.Generator().manual_seed(3)
    left = 0.05 * torch.randn(shape, generator=draw)
    right = (left + 1e-2 * torch.randn(shape, generator=draw)).to(dtype)
    left = left.to(dtype)
    right = torch.where(torch.rand(shape, generator=draw) < equal, left, right)
    models, facts = {"a": left, "b": right}, Facts()
    operator = ArceeFusion(lam)
    assert (operator.measure([left, right]).quartiles[2] == 0) == (equal > 0)
    fold = TensorFold("w", lambda leaf: as_array(models[leaf]))
    merged = as_tensor(fold.merge(parse(["a", "b"]), operator, facts)).double()
    there = left.double()
    told = facts["a+b"]
    assert told["changed"] == int((merged != there).sum()) / merged.numel() > 0
    norms = [float(np.linalg.norm(one.numpy().reshape(-1))) for one in (merged - there, there)]
    assert [told["update_norm"], told["left_norm"]] == pytest.approx(norms, rel=1e-6)


def test_a_change_is_told_from_the_trees_first_leaf(tiny_student: Path, tmp_path: Path) -> None:
    """Where the root's Left is a merged model, the root knows only the change from that one."""
    experts = {name: perturbed(tiny_student, tmp_path / name, seed) for seed, name in enumerate(FLAT, start=1)}
    out = merge(recipe(experts, tmp_path / "merged", tree=[["math", "science"], "code"], lam=0.5))
    merged, left = load(out), load(experts["math"])
    differing = {name: int((merged[name] != tensor).sum()) for name, tensor in left.items()}
    table = {row["tensor"]: row for row in json.loads((out / "tensors.json").read_text())}
    assert {name: row["changed"] for name, row in table.items()} == {
        name: number / left[name].numel() for name, number in differing.items()
    }
    assert any(row["changed"] != row["nodes"]["math+science++code"]["changed"] for row in table.values())
    for name, row in table.items():
        assert row["update_norm"] == pytest.approx(float((merged[name] - left[name]).double().norm()), rel=1e-6)
    manifest = read_manifest(out)
    elements = sum(tensor.numel() for tensor in left.values())
    assert manifest is not None
    assert manifest.merge["share_differing_from_math"] == sum(differing.values()) / elements
