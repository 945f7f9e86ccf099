"""The anatomy of a merge agrees with plain numpy, and does not touch the merge itself."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from branchmerge.merge import Recipe, merge, merge_all
from branchmerge.merge.anatomy import MERGED, Counts, in_words, short_names
from branchmerge.merge.anatomy import compare as compare_arrays
from branchmerge.merge.arrays import as_array
from branchmerge.merge.density import by_node, by_place, module_of, modules_in_order
from branchmerge.merge.operators import make_operator
from branchmerge.merge.scan import changes
from branchmerge.merge.threads import workers
from branchmerge.merge.tree import parse
from branchmerge.study import read_manifest, weights_sha256

NAMES = ["code", "science", "math"]
NESTED = ["code", ["science", "math"]]
FIGURES = ["contributions.png", "density_by_layer.png", "task_vector_cosines.png"]
SHAPES = [(0,), (1,), (7,), (3, 1024), (5, 700), (2, 3, 5), ()]
Folders = dict[str, Path]


def tensors(
    shape: tuple[int, ...], dtypes: Sequence[torch.dtype], seed: int = 0
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Backbone, three leaves some of whose elements are equal, and a merged tensor that selects from them."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw)
    moves = [0.1 * torch.randn(shape, generator=draw).round() for _ in NAMES]
    leaves = [(base + move).to(dtype) for move, dtype in zip(moves, dtypes, strict=False)]
    choice = torch.randint(3, shape, generator=draw)
    merged = sum(torch.where(choice == k, leaf.double(), 0.0) for k, leaf in enumerate(leaves))
    assert isinstance(merged, Tensor)
    return base.to(dtypes[3]), leaves, merged.to(dtypes[0])


def compare(merged: Tensor, leaves: Sequence[Tensor], base: Tensor | None) -> Counts:
    origin = None if base is None else as_array(base)
    return compare_arrays(as_array(merged), [as_array(leaf) for leaf in leaves], origin)


def wide(tensor: Tensor) -> Any:
    return tensor.double().numpy().reshape(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32] * 4, [torch.bfloat16] * 4, [torch.float16] * 4, [torch.float64] * 4,
     [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]],
)  # fmt: skip
def test_the_numbers_are_those_of_numpy(shape: tuple[int, ...], dtypes: list[torch.dtype]) -> None:
    base, leaves, merged = tensors(shape, dtypes)
    counts = compare(merged, leaves, base)
    w0, w, out = wide(base), [wide(leaf) for leaf in leaves], wide(merged)
    differ = (w[0] != w[1]) | (w[0] != w[2])
    equal = [(one == out) & differ for one in w]
    assert counts.taken[3, 3] == differ.sum()
    d = [one - w0 for one in [*w, out]]
    for j in range(3):
        same = (np.sign(d[j]) == np.sign(d[3])) & (d[3] != 0)
        assert counts.signs[j] == same.sum()
        for k in range(j, 3):
            assert counts.taken[j, k] == (equal[j] & equal[k]).sum()
    assert counts.signs[3] == (d[3] != 0).sum()
    for j in range(4):
        for k in range(j, 4):
            size = np.linalg.norm(d[j]) * np.linalg.norm(d[k])
            assert counts.gram[j, k] == pytest.approx(d[j] @ d[k], abs=1e-6 * size + 1e-30)


def test_a_large_tensor_agrees_with_numpy_whatever_the_number_of_threads() -> None:
    base, leaves, merged = tensors((3, 1 << 20), [torch.bfloat16] * 4)
    threads, found = workers.count, []
    try:
        for count in (1, 2, 3):
            workers.use(count)
            found.append((compare(merged, leaves, base), changes(merged, leaves[0])))
    finally:
        workers.use(threads)
    first, change = found[0]
    for counts, other in found[1:]:
        assert other == change
        for name in ("taken", "gram", "signs"):
            assert np.array_equal(getattr(counts, name), getattr(first, name))
    d = [wide(tensor) - wide(base) for tensor in [*leaves, merged]]
    assert first.gram[0, 3] == pytest.approx(d[0] @ d[3], rel=1e-6)
    assert first.signs[1] == ((np.sign(d[1]) == np.sign(d[3])) & (d[3] != 0)).sum()
    assert change.changed == int((merged != leaves[0]).sum())
    assert change.norm == pytest.approx(np.linalg.norm(wide(merged) - wide(leaves[0])), rel=1e-6)
    assert change.norm_before == pytest.approx(np.linalg.norm(wide(leaves[0])), rel=1e-6)


def test_without_a_backbone_there_is_no_gram() -> None:
    _, leaves, merged = tensors((5, 700), [torch.float32] * 4)
    counts = compare(merged, leaves, None)
    assert not counts.gram.any() and not counts.signs.any() and counts.taken.any()


def test_shares_and_overlaps_by_hand() -> None:
    #                    base  0  0  0  0      both have 2 in the third place; the fourth is not contested
    leaves = [torch.tensor([1.0, 1, 2, 5]), torch.tensor([-1.0, 3, 2, 5]), torch.tensor([2.0, 4, 7, 5])]
    counts = compare(torch.tensor([1.0, 3, 2, 5]), leaves, torch.zeros(4))
    assert [counts.taken_share(k) for k in range(3)] == [2 / 3, 2 / 3, 0.0]
    assert [counts.overlap(0, 1), counts.overlap(1, 0), counts.overlap(0, 2)] == [1 / 3, 1 / 3, 0.0]
    assert [counts.same_sign(k) for k in range(3)] == [1.0, 0.75, 1.0]


def test_what_no_leaf_says_is_contested_only_where_they_differ() -> None:
    """As of an average that is rounded, or of twice a task vector."""
    leaves = [torch.tensor([1.0, 1, 1]), torch.tensor([1.0, 1, 2])]
    counts = compare(torch.tensor([1.0, 5, 1.5]), leaves, None)
    assert counts.taken[2, 2] == 1
    assert [counts.taken_share(0), counts.taken_share(1), counts.overlap(0, 1)] == [0.0, 0.0, None]


def test_equal_models_have_no_shares_and_zero_vectors_no_cosine() -> None:
    one = torch.ones(4)
    counts = compare(one, [one, one], one)
    assert [counts.taken_share(0), counts.overlap(0, 1), counts.same_sign(0), counts.cosine(0, 1)] == [None] * 4


@pytest.mark.parametrize("norm", [1e-18, 1e-5, 1.0])
def test_orthogonal_and_parallel_task_vectors(norm: float) -> None:
    base, x, y = torch.zeros(4096), torch.zeros(4096), torch.zeros(4096)
    x[::2], y[1::2] = norm, 2 * norm
    counts = compare((x + y) / 2, [x, y, 3 * x, -x], base)
    assert counts.cosine(0, 1) == 0.0
    assert counts.cosine(0, 2) == counts.cosine(2, 0) == pytest.approx(1.0, abs=1e-6)
    assert counts.cosine(0, 3) == pytest.approx(-1.0, abs=1e-6)
    assert counts.cosine(1, 4) == pytest.approx(2 / 5**0.5, rel=1e-6)


def summary(cosines: dict[str, float | None]) -> dict[str, Any]:
    return {"cosines": cosines, "taken": {"a": 0.5, "b": None}, "same_sign": {"a": 1.0, "b": 0.25}}


def test_the_lines_say_whether_the_papers_assumption_holds() -> None:
    good = in_words(summary({"a b": -0.03, f"a {MERGED}": 0.9}), selects=True)
    assert good[0] == "task vectors: cosines a-b -0.03: near-orthogonal (all |cos| < 0.1), as the paper assumes"
    assert "takes a 0.50, b -; has the sign of a 1.00, b 0.25" in good[1]
    bad = in_words(summary({"a b": -0.42, "a c": 0.2, "b c": 0.0}), selects=False)
    assert "not orthogonal (a-b -0.42), though the paper assumes so" in bad[0] and "takes" not in bad[1]
    assert "not orthogonal (a-b 0.10)" in in_words(summary({"a b": 0.1}), selects=True)[0]
    assert "have no cosines" in in_words(summary({"a b": None}), selects=True)[0]


def test_names_of_folders_are_short_where_that_is_clear() -> None:
    assert short_names(["code", "/my/left"]) == ["code", "left"]
    assert short_names(["/a/x", "/b/x"]) == short_names(["x", "merged"]) == ["model1", "model2"]


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("model.embed_tokens.weight", "embeddings"), ("lm_head.weight", "embeddings"), ("model.norm.weight", "norms"),
        ("model.layers.3.input_layernorm.weight", "norms"), ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("model.layers.3.self_attn.q_proj.weight", "q_proj"), ("model.layers.3.self_attn.q_proj.bias", "q_proj"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", "up_proj"), ("transformer.h.0.attn.c_attn.weight", "c_attn"),
        ("model.layers.0.mixer.A_log", "A_log"), ("weight", "weight"),
    ],
)  # fmt: skip
def test_modules_by_name(tensor: str, module: str) -> None:
    assert module_of(tensor) == module


def test_densities_are_weighed_by_elements() -> None:
    def entry(name: str, shape: list[int], changed: float, update: float, left: float = 5.0) -> dict[str, Any]:
        facts = {"changed": changed, "update_norm": update, "left_norm": left}
        return {"tensor": name, "shape": shape, "nodes": {"a+b": facts}}

    table = [
        entry("model.layers.0.mlp.up_proj.weight", [2, 4], 0.5, 3.0),
        entry("model.layers.0.mlp.up_proj.bias", [2], 1.0, 4.0),
        entry("model.norm.weight", [10], 0.0, 0.0),
    ]
    places = by_place(table, "a+b")
    assert list(places) == [(0, "up_proj"), (None, "norms")]
    assert (places[0, "up_proj"].density, places[0, "up_proj"].elements) == (0.6, 10)
    assert places[0, "up_proj"].relative_update == pytest.approx(5 / 50**0.5)
    assert by_node(table)["a+b"].density == 0.3
    assert by_node([entry("x", [4], 0.5, 0.003, left=0.01)])["a+b"].relative_update == pytest.approx(0.3)
    assert by_node([entry("x", [4], 0.5, 0.003, left=0.0)])["a+b"].relative_update == 0.0
    assert modules_in_order(["x", "up_proj", "a", "norms", "x"]) == ["norms", "up_proj", "a", "x"]


@pytest.fixture(scope="module")
def experts(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three experts in bfloat16; do not write into them."""
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(NAMES):
        shutil.copytree(tiny_student, root / name)
        draw = torch.Generator().manual_seed(seed)
        weights = load_file(tiny_student / "model.safetensors")
        moved = {key: (t + 0.01 * torch.randn(t.shape, generator=draw)).bfloat16() for key, t in weights.items()}
        moved["position"] = torch.arange(5)
        moved["empty.weight"] = torch.empty(0, 4, dtype=torch.bfloat16)
        save_file(moved, root / name / "model.safetensors", metadata={"format": "pt"})
    base = shutil.copytree(root / "code", root / "base")
    stored = {key: t.bfloat16() for key, t in load_file(tiny_student / "model.safetensors").items()}
    extra = {"position": torch.arange(5), "empty.weight": torch.empty(0, 4, dtype=torch.bfloat16)}
    save_file({**stored, **extra}, base / "model.safetensors", metadata={"format": "pt"})
    return {name: root / name for name in [*NAMES, "base"]}


def recipe(experts: Folders, out: Path, operator: str = "arcee_fusion", tree: Any = NESTED, **more: Any) -> Recipe:
    fields = {"anatomy": True, **{key: more.pop(key) for key in ("base", "origin", "anatomy") if key in more}}
    folders = {name: experts[name] for name in parse(tree).leaves}
    return Recipe(operator, make_operator(operator, more), parse(tree), folders, out, progress=False, **fields)


def anatomy(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "anatomy.json").read_text())
    return found


def test_a_merge_has_figures_numbers_and_lines(
    experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = merge(recipe(experts, tmp_path / "merged", origin=experts["base"]))
    assert sorted(path.name for path in (out / "figures").iterdir()) == FIGURES
    for name in FIGURES:
        with Image.open(out / "figures" / name) as image:
            assert image.format == "PNG" and "Software" not in image.info
            assert 300 < image.width < 3000 and 300 < image.height < 3000
    printed, card = capsys.readouterr().out, (out / "README.md").read_text()
    line = "cosines code-science 0.00, code-math 0.00, science-math 0.00: near-orthogonal"
    assert line in printed and line in card
    assert "| `science+math` | 0." in card and "| `code++science+math` | 0." in card


def test_the_files_numbers_are_those_of_the_weights(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "merged", origin=experts["base"]))
    found = anatomy(out)
    loaded = {name: load_file(folder / "model.safetensors") for name, folder in {**experts, MERGED: out}.items()}
    floats = sorted(key for key, t in loaded["base"].items() if t.is_floating_point())
    ends = {name: np.concatenate([wide(weights[key]) for key in floats]) for name, weights in loaded.items()}
    d = {name: ends[name] - ends["base"] for name in [*NAMES, MERGED]}
    for pair, cosine in found["cosines"].items():
        a, b = pair.split(" ")
        assert cosine == pytest.approx(d[a] @ d[b] / np.linalg.norm(d[a]) / np.linalg.norm(d[b]), abs=1e-6)
    differ = (ends["code"] != ends["science"]) | (ends["code"] != ends["math"])
    assert found["contested"] == differ.sum()
    for name in NAMES:
        assert found["taken"][name] == ((ends[name] == ends[MERGED]) & differ).sum() / differ.sum()
    root = found["nodes"]["code++science+math"]
    assert root["density"] == (ends["code"] != ends[MERGED]).mean()
    table = json.loads((out / "tensors.json").read_text())
    assert [entry["tensor"] for entry in table if "cosines" not in entry] == []
    assert "position" not in {entry["tensor"] for entry in table}


def test_weights_and_identity_are_the_same_with_and_without(experts: Folders, tmp_path: Path) -> None:
    plain = merge(recipe(experts, tmp_path / "plain", anatomy=False))
    full = merge(recipe(experts, tmp_path / "full", origin=experts["base"]))
    assert (plain / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    assert not (plain / "figures").exists() and not (plain / "anatomy.json").exists()
    table = json.loads((plain / "tensors.json").read_text())
    assert {"changed", "update_norm", "kl_median"} <= set(table[-1]["nodes"]["science+math"])
    assert "taken" not in table[-1]
    one, two = read_manifest(plain), read_manifest(full)
    assert one is not None and two is not None
    assert one.identity() == two.identity() and len(two.parents) == 3
    before = weights_sha256(full)
    assert merge(recipe(experts, tmp_path / "full", anatomy=False)) == full and weights_sha256(full) == before


def test_a_backbone_of_another_dtype_changes_no_weight(experts: Folders, tmp_path: Path) -> None:
    wider = shutil.copytree(experts["base"], tmp_path / "wider")
    weights = {
        key: t.float() if t.is_floating_point() else t for key, t in load_file(wider / "model.safetensors").items()
    }
    save_file(weights, wider / "model.safetensors", metadata={"format": "pt"})
    plain = merge(recipe(experts, tmp_path / "plain", "linear", NAMES, anatomy=False))
    full = merge(recipe(experts, tmp_path / "full", "linear", NAMES, origin=wider))
    assert (plain / "model.safetensors").read_bytes() == (full / "model.safetensors").read_bytes()
    assert "cosines" in anatomy(full)


def test_two_runs_write_the_same_bytes_with_any_threads(experts: Folders, tmp_path: Path) -> None:
    threads, made = workers.count, []
    try:
        for count in (1, 3):
            workers.use(count)
            made.append(merge(recipe(experts, tmp_path / str(count) / "merged", origin=experts["base"])))
    finally:
        workers.use(threads)
    one, two = made
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert [str(file) for file in files if (one / file).read_bytes() != (two / file).read_bytes()] in (
        [], ["manifest.json"],  # which holds times
    )  # fmt: skip


def test_a_sweep_has_an_anatomy_each(experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, many, none = merge_all(
        [
            recipe(experts, tmp_path / name, origin=experts["base"], lam=lam, anatomy=drawn)
            for name, lam, drawn in (("few", 1.5, True), ("many", 0.0, True), ("none", 1.0, False))
        ]
    )
    alone = merge(recipe(experts, tmp_path / "alone", origin=experts["base"]))
    assert anatomy(few) == anatomy(alone)
    assert anatomy(many)["taken"]["code"] < anatomy(few)["taken"]["code"]
    assert not (none / "anatomy.json").exists()
    assert capsys.readouterr().out.count("task vectors: ") == 3


def test_an_operator_that_averages_is_told_by_signs(experts: Folders, tmp_path: Path) -> None:
    out = merge(recipe(experts, tmp_path / "merged", "task_arithmetic", NAMES, base=experts["base"]))
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        "contributions.png", "task_vector_cosines.png", "update_by_layer.png",
    ]  # fmt: skip
    found = anatomy(out)
    assert not found["selects"] and all(0.5 < found["same_sign"][name] < 1 for name in NAMES)
    assert all(0.4 < found["cosines"][f"{name} {MERGED}"] < 0.8 for name in NAMES)  # about 1 / sqrt(3)


def test_without_a_backbone_it_is_told_once_how_to_give_it(
    experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = merge_all([recipe(experts, tmp_path / name, lam=lam) for name, lam in (("a", 0.5), ("b", 1.5))])
    assert capsys.readouterr().out.count("backbone.path=") == 1
    for out in outs:
        assert sorted(path.name for path in (out / "figures").iterdir()) == FIGURES[:2]
        assert "cosines" not in anatomy(out)


def test_a_backbone_that_does_not_fit_is_left_out(
    experts: Folders, tmp_path: Path, student_factory: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other = student_factory(tmp_path / "other", hidden_size=64)
    out = merge(recipe(experts, tmp_path / "merged", origin=other))
    assert capsys.readouterr().out.count(f"{other} is no backbone of these models") == 1
    assert "cosines" not in anatomy(out)


def test_a_backbone_with_fewer_rows_is_left_out(
    experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All names are there: the loops that compare would read beyond its end."""
    cut = Path(shutil.copytree(experts["base"], tmp_path / "cut"))
    weights = load_file(cut / "model.safetensors")
    rows, columns = weights["model.embed_tokens.weight"].shape
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-32].clone()
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    out = merge(recipe(experts, tmp_path / "merged", origin=cut))
    said = f"(model.embed_tokens.weight: [{rows}, {columns}] and [{rows - 32}, {columns}]); it is left out"
    assert capsys.readouterr().out.count(said) == 1 and "cosines" not in anatomy(out)


def test_a_broken_backbone_is_left_out(experts: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = shutil.copytree(experts["base"], tmp_path / "bad")
    weights = load_file(bad / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
    out = merge(recipe(experts, tmp_path / "merged", origin=bad))
    assert capsys.readouterr().out.count("model.norm.weight holds NaN") == 1
    assert "cosines" not in anatomy(out) and "NaN" not in (out / "anatomy.json").read_text()
