"""What holds for whole checkpoints and every operator: identity, limits, and bytes that depend on nothing else."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from branchmerge.merge import Recipe, merge
from branchmerge.merge.operators import OPERATORS, make_operator
from branchmerge.merge.threads import workers
from branchmerge.merge.tree import parse

EVERY = pytest.mark.parametrize("name", sorted(OPERATORS))
Weights = dict[str, Tensor]
SHAPES = {"model.embed_tokens.weight": (16, 8), "model.layers.0.mlp.up_proj.weight": (12, 8),
          "model.layers.10.mlp.up_proj.weight": (12, 8), "model.norm.weight": (8,), "scale": (),
          "none": (0, 4)}  # fmt: skip
LARGE = {"model.layers.0.mlp.up_proj.weight": (1100, 1000), "model.layers.1.mlp.up_proj.weight": (520, 640)}
"""Above the sizes from which operators and scans cut their work: 2^20 elements, and 2^18."""


def tensors(shapes: Mapping[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def checkpoint(folder: Path, weights: Weights, shards: Mapping[str, int] | None = None) -> Path:
    """A checkpoint in one file, or with each tensor in the shard of its number."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 16}))
    if shards is None:
        save_file(weights, folder / "model.safetensors")
        return folder
    files = {name: f"part-{number}.safetensors" for name, number in shards.items()}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def merged(name: str, folders: Mapping[str, Path], base: Path, out: Path, **parameters: Any) -> Path:
    operator = make_operator(name, parameters)
    leaves = ["a", "b", "c"] if operator.n_way else ["a", ["b", "c"]]
    used = base if operator.needs_base() else None
    return merge(Recipe(name, operator, parse(leaves), dict(folders), out, used, 1 << 12, progress=False))


def written(folder: Path) -> dict[str, bytes]:
    paths = (*folder.glob("*.safetensors"), folder / "tensors.json")
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def restored() -> Iterator[None]:
    before = workers.count, torch.get_num_threads()
    yield
    workers.use(before[0])
    torch.set_num_threads(before[1])


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_merged_with_itself_is_itself(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    weights = tensors(SHAPES, 1, dtype)
    folders = {leaf: checkpoint(tmp_path / leaf, weights) for leaf in ("a", "b", "c", "base")}
    out = merged(name, folders, folders["base"], tmp_path / "out")
    found = {key: value for path in out.glob("*.safetensors") for key, value in load_file(path).items()}
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert found[key].dtype == dtype and found[key].shape == tensor.shape
        tight = {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[key], tensor, **tight)


@pytest.mark.parametrize(("lam", "expected"), [("-inf", "right"), ("inf", "left"), (float("inf"), "left")])
@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_lambda_without_bound_gives_left_or_right(
    lam: Any, expected: str, shapes: Mapping[str, tuple[int, ...]], tmp_path: Path
) -> None:
    parents = {leaf: tensors(shapes, seed) for seed, leaf in enumerate(("left", "right"))}
    folders = {leaf: checkpoint(tmp_path / leaf, weights) for leaf, weights in parents.items()}
    operator = make_operator("arcee_fusion", {"lam": float(lam)})
    out = merge(Recipe("arcee_fusion", operator, parse(["left", "right"]), folders, tmp_path / "out", progress=False))
    found = load_file(out / "model.safetensors")
    differing = [name for name, tensor in parents[expected].items() if not torch.equal(found[name], tensor)]
    assert differing == []


@EVERY
def test_the_number_of_threads_changes_no_byte(name: str, tmp_path: Path, restored: None) -> None:
    folders = {leaf: checkpoint(tmp_path / leaf, tensors(LARGE, seed, torch.bfloat16))
               for seed, leaf in enumerate(("a", "b", "c", "base"))}  # fmt: skip
    found = []
    for count in (1, 2, 5):
        workers.use(count)
        torch.set_num_threads(count)
        found.append(written(merged(name, folders, folders["base"], tmp_path / str(count) / "out")))
    assert found[0] == found[1] == found[2]


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_how_the_parents_are_cut_into_shards_changes_no_byte(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("cut")
    name = data.draw(st.sampled_from(["arcee_fusion", "linear", "ties", "dare_linear"]))
    whole, cut = {}, {}
    for seed, leaf in enumerate(("a", "b", "c", "base")):
        weights = tensors(SHAPES, seed)
        whole[leaf] = checkpoint(root / "whole" / leaf, weights)
        order = data.draw(st.permutations(sorted(weights)))
        shards = {tensor: data.draw(st.integers(0, 3)) for tensor in order}
        cut[leaf] = checkpoint(root / "cut" / leaf, {tensor: weights[tensor] for tensor in order}, shards)
    one = written(merged(name, whole, whole["base"], root / "one" / "out"))
    two = written(merged(name, cut, cut["base"], root / "two" / "out"))
    assert one == two


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["a", "c", "base"])
def test_a_number_that_is_none_is_found_in_every_dtype(
    dtype: torch.dtype, value: float, where: str, tmp_path: Path
) -> None:
    folders = {}
    for seed, leaf in enumerate(("a", "b", "c", "base")):
        weights = tensors(SHAPES, seed, dtype)
        if leaf == where:
            weights["model.layers.10.mlp.up_proj.weight"][-1, -1] = value
        folders[leaf] = checkpoint(tmp_path / leaf, weights)
    said = rf"{folders[where]}: the tensor model\.layers\.10\.mlp\.up_proj\.weight holds NaN or infinity"
    with pytest.raises(Exception, match=said) as raised:
        merged("ties", folders, folders["base"], tmp_path / "results" / "out")
    assert type(raised.value).__name__ == "UserError"
    assert [path.name for path in (tmp_path / "results").iterdir() if not path.name.endswith(".lock")] == []
