"""Models of other dtypes than float32, and of two at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from merging import FLAT, in_another_dtype, load, perturbed, recipe
from safetensors.torch import save_file
from test_stream import Folders, assert_equal, experts

from branchmerge.errors import UserError
from branchmerge.merge import merge
from branchmerge.study import read_manifest

__all__ = ["experts"]


def test_bfloat16_stays_and_every_element_is_one_of_the_parents(tiny_student: Path, tmp_path: Path) -> None:
    folders = {
        name: perturbed(tiny_student, tmp_path / name, seed, torch.bfloat16) for seed, name in enumerate(FLAT, start=1)
    }
    merged = load(merge(recipe(folders, tmp_path / "merged", lam=0.0)))
    parents = [load(folder) for folder in folders.values()]
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.stack([tensor == parent[name] for parent in parents]).any(0).all(), name


def test_a_mean_in_bfloat16_is_rounded_once(tiny_student: Path, tmp_path: Path) -> None:
    folders = {
        name: perturbed(tiny_student, tmp_path / name, seed, torch.bfloat16) for seed, name in enumerate(FLAT, start=1)
    }
    merged = load(merge(recipe(folders, tmp_path / "merged", "linear", FLAT)))
    parents = [load(folder) for folder in folders.values()]
    for name, tensor in merged.items():
        mean = torch.stack([parent[name].double() for parent in parents]).mean(0)
        assert torch.equal(tensor, mean.float().bfloat16()), name


def test_a_number_of_right_that_lefts_dtype_does_not_hold_ends_the_merge(experts: Folders, tmp_path: Path) -> None:
    left = in_another_dtype(experts["math"], tmp_path / "left", torch.float16)
    right = in_another_dtype(experts["math"], tmp_path / "right", torch.float32, 70000.0)
    with pytest.raises(UserError, match=r"up_proj\.weight as float16 holds NaN or infinity"):
        merge(recipe({"left": left, "right": right}, tmp_path / "merged", tree=["left", "right"]))


def test_what_rounding_to_lefts_dtype_undoes_is_no_change(experts: Folders, tmp_path: Path) -> None:
    """Right is Left before it was rounded: whatever is taken from it becomes Left's value again."""
    left = in_another_dtype(experts["math"], tmp_path / "left", torch.bfloat16)
    folders = {"left": left, "right": experts["math"]}
    out = merge(recipe(folders, tmp_path / "merged", tree=["left", "right"], lam=0.0))
    assert_equal(load(out), load(left))
    manifest, table = read_manifest(out), json.loads((out / "tensors.json").read_text())
    assert manifest is not None and manifest.merge["share_differing_from_left"] == 0
    assert {row["changed"] for row in table} == {row["update_norm"] for row in table} == {0}
    assert max(node["changed"] for row in table for node in row["nodes"].values()) > 0.1


def test_integers_are_copied_where_all_have_the_same_and_refused_where_not(experts: Folders, tmp_path: Path) -> None:
    folders = {}
    for name, third in (("a", 2), ("b", 2), ("c", 3)):
        folders[name] = Path(shutil.copytree(experts["math"], tmp_path / name))
        weights = {**load(folders[name]), "position": torch.tensor([0, 1, third]), "mask": torch.tensor([True, False])}
        save_file(weights, folders[name] / "model.safetensors", metadata={"format": "pt"})
    merged = load(merge(recipe(folders, tmp_path / "merged", "linear", ["a", "b"])))
    assert merged["position"].tolist() == [0, 1, 2] and merged["mask"].tolist() == [True, False]
    with pytest.raises(UserError, match="a and c cannot be merged: the integers of position differ"):
        merge(recipe(folders, tmp_path / "out" / "merged", "linear", ["a", "c"]))
