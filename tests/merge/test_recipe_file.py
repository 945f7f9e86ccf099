"""recipe.yaml makes a merged model again, byte for byte, and refuses other parents."""

from pathlib import Path

import pytest
from merging import FLAT, NESTED, file_bytes, perturbed, recipe

from branchmerge.errors import UserError
from branchmerge.merge import merge, recipe_file
from branchmerge.merge.tree import parse


@pytest.fixture(scope="module")
def experts(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {name: perturbed(tiny_student, root / name, seed) for seed, name in enumerate(FLAT, start=1)}


@pytest.mark.parametrize(
    ("operator", "tree", "more"),
    [
        ("arcee_fusion", NESTED, {"lam": 0.5, "max_shard_bytes": 60_000}),
        (
            "arcee_fusion",
            NESTED,
            {"rules": [{"tensors": "mlp", "layers": [0, 0], "lam": 0.25}, {"layers": 1, "lam": 3}]},
        ),
        ("dare_ties", FLAT, {"density": [0.3, 0.5, 0.7], "seed": 7}),
        ("ties", FLAT, {"weights": [1, 2, 3]}),
        ("linear", ["math", "code"], {}),
    ],
)
def test_a_model_is_made_again_byte_for_byte(
    tiny_student: Path,
    experts: dict[str, Path],
    tmp_path: Path,
    operator: str,
    tree: list[str],
    more: dict[str, object],
) -> None:
    base = tiny_student if operator in ("ties", "dare_ties") else None
    folders = {leaf: experts[leaf] for leaf in parse(tree).leaves}
    first = merge(recipe(folders, tmp_path / "first", operator, tree, base=base, **more))
    again = merge(recipe_file.load(first / "recipe.yaml", tmp_path / "again", progress=False))
    assert file_bytes(again) == file_bytes(first)
    names = sorted(path.name for path in first.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    assert (again / "tensors.json").read_bytes() == (first / "tensors.json").read_bytes()
    assert (again / "recipe.yaml").read_bytes() == (first / "recipe.yaml").read_bytes()


@pytest.mark.parametrize(
    ("operator", "more", "again"),
    [
        ("arcee_fusion", {}, "byte for byte"),
        ("arcee_fusion", {"precision": "float32"}, "byte for byte on a processor of the same kind"),
        (
            "arcee_fusion",
            {"rules": [{"tensors": "mlp", "precision": "bfloat16"}]},
            "byte for byte on a processor of the same kind",
        ),
        ("arcee_fusion_mergekit", {}, "byte for byte on a processor of the same kind"),
    ],
)
def test_recipe_and_card_promise_what_the_operator_can_hold(
    experts: dict[str, Path], tmp_path: Path, operator: str, more: dict[str, object], again: str
) -> None:
    folder = merge(recipe(experts, tmp_path / "merged", operator, **more))
    assert f"# Makes this model again, {again}: python merge.py" in (folder / "recipe.yaml").read_text()
    assert f"makes the model again, {again};" in (folder / "README.md").read_text()


def test_parents_that_changed_are_refused(experts: dict[str, Path], tiny_student: Path, tmp_path: Path) -> None:
    mine = perturbed(tiny_student, tmp_path / "mine", 5)
    first = merge(recipe({"math": experts["math"], "mine": mine}, tmp_path / "first", tree=["math", "mine"]))
    (perturbed(tiny_student, tmp_path / "other", 6) / "model.safetensors").replace(mine / "model.safetensors")
    with pytest.raises(UserError, match=r"mine: its weights have the SHA-256 .* the recipe was made with"):
        merge(recipe_file.load(first / "recipe.yaml", tmp_path / "again", progress=False))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("text", ["", "just words", "operator: ties", "{", "operator: nothing\nparameters: {}"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="recipe"):
        recipe_file.load(path, tmp_path / "out")


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        recipe_file.load(tmp_path / "recipe.yaml", tmp_path / "out")


def test_a_changed_parent_called_base_is_refused(experts: dict[str, Path], tiny_student: Path, tmp_path: Path) -> None:
    """It is not taken for the backbone, whose weights are the same."""
    mine = perturbed(tiny_student, tmp_path / "mine", 5)
    folders = {"math": experts["math"], "base": mine}
    first = merge(recipe(folders, tmp_path / "first", "task_arithmetic", ["math", "base"], base=tiny_student))
    (perturbed(tiny_student, tmp_path / "other", 6) / "model.safetensors").replace(mine / "model.safetensors")
    with pytest.raises(UserError, match="mine: its weights have the SHA-256"):
        merge(recipe_file.load(first / "recipe.yaml", tmp_path / "again", progress=False))
