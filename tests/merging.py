"""What several tests of the merge stage make: experts of the tiny student, and recipes over them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from branchmerge.merge import Recipe
from branchmerge.merge.operators import make_operator
from branchmerge.merge.rules import parse_rules
from branchmerge.merge.tree import parse

NESTED = ["code", ["science", "math"]]
FLAT = ["code", "science", "math"]


def perturbed(student: Path, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A copy of a student whose weights have moved a little."""
    shutil.copytree(student, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (tensor + 0.01 * torch.randn(tensor.shape, generator=generator)).to(dtype)
        for name, tensor in load_file(student / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(
    folders: dict[str, Path], out: Path, operator: str = "arcee_fusion", tree: Any = NESTED, **more: Any
) -> Recipe:
    """A recipe; what is no field of it is a parameter of the operator."""
    names = ("base", "max_shard_bytes", "overwrite", "vocab", "anatomy", "origin", "device")
    fields = {key: more.pop(key) for key in names if key in more}
    fields["rules"] = parse_rules(more.pop("rules", []))
    return Recipe(operator, make_operator(operator, more), parse(tree), folders, out, progress=False, **fields)


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def in_another_dtype(folder: Path, copy: Path, dtype: torch.dtype, value: float | None = None) -> Path:
    """A copy of a checkpoint, with another number in one place."""
    shutil.copytree(folder, copy)
    weights = {name: tensor.to(dtype) for name, tensor in load(folder).items()}
    if value is not None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def file_bytes(folder: Path) -> dict[str, bytes]:
    """The weights' files."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
