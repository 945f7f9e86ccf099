"""A sweep is merged in one pass over the experts, and every member comes out as if it were alone."""

from pathlib import Path

import pytest
import torch
from merging import FLAT, NESTED, file_bytes, load, perturbed, recipe
from safetensors.torch import save_file

from branchmerge.errors import UserError
from branchmerge.merge import merge, merge_all
from branchmerge.merge.operators.arcee_fusion import ArceeFusion
from branchmerge.study import read_manifest

MEMBERS = [
    ("arcee_fusion", NESTED, {"lam": 0.5}),
    ("arcee_fusion", NESTED, {"lam": 1.5}),
    ("arcee_fusion", [["math", "science"], "code"], {"lam": 0.5}),
    ("arcee_fusion", NESTED, {"lam": 0.5, "kl": "tensor"}),
    ("arcee_fusion_null", NESTED, {"by": "random"}),
    ("linear", FLAT, {}),
    ("linear", ["math", "code", "science"], {"weights": [3, 1, 1]}),
]


@pytest.fixture(scope="module")
def experts(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("experts")
    return {name: perturbed(tiny_student, root / name, seed) for seed, name in enumerate(FLAT, start=1)}


def test_every_member_is_what_it_is_alone(experts: dict[str, Path], tmp_path: Path) -> None:
    def of(number: int, folder: Path):  # type: ignore[no-untyped-def]
        operator, tree, parameters = MEMBERS[number]
        return recipe(experts, folder / str(number), operator, tree, **parameters)

    together = merge_all([of(number, tmp_path / "together") for number in range(len(MEMBERS))])
    for number, folder in enumerate(together):
        alone = merge(of(number, tmp_path / "alone"))
        assert file_bytes(folder) == file_bytes(alone)
        one, two = read_manifest(folder), read_manifest(alone)
        assert one is not None and two is not None
        assert (one.work, one.weights_sha256, one.parents) == (two.work, two.weights_sha256, two.parents)
    assert len({folder.joinpath("model.safetensors").read_bytes() for folder in together}) == len(MEMBERS)


def test_leaves_are_measured_once_for_all_lambdas(
    experts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    measure = ArceeFusion.measure

    def counted(self: ArceeFusion, models, base=None):  # type: ignore[no-untyped-def]
        measured.append(self.lam)
        return measure(self, models, base)

    monkeypatch.setattr(ArceeFusion, "measure", counted)
    recipes = [recipe(experts, tmp_path / str(lam), lam=lam) for lam in (0.5, 1.0, 1.5)]
    measured.clear()  # the recipes' own dry runs
    merge_all(recipes)
    tensors = len(load(tmp_path / "0.5"))
    # science and math once; then code with what each lambda made of them.
    assert len(measured) == tensors * (1 + 3)


def test_a_finished_member_is_not_made_again(experts: dict[str, Path], tmp_path: Path) -> None:
    first = merge(recipe(experts, tmp_path / "a", lam=0.5))
    before = (first / "model.safetensors").stat().st_mtime_ns
    merge_all([recipe(experts, tmp_path / "a", lam=0.5), recipe(experts, tmp_path / "b", lam=1.0)])
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert read_manifest(tmp_path / "b") is not None


def test_two_members_cannot_write_one_folder(experts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two members of this sweep would write it"):
        merge_all([recipe(experts, tmp_path / "a", lam=0.5), recipe(experts, tmp_path / "a", lam=1.0)])


def test_one_broken_member_leaves_nothing_half_written(experts: dict[str, Path], tmp_path: Path) -> None:
    far = perturbed(experts["math"], tmp_path / "far", 9)
    broken = {name: torch.full_like(tensor, 1e38) for name, tensor in load(far).items()}
    save_file(broken, far / "model.safetensors")
    folders = {"math": experts["math"], "far": far}
    members = [
        recipe(folders, tmp_path / "out" / "fine", "linear", ["math", "far"]),
        recipe(folders, tmp_path / "out" / "overflow", "linear", ["math", "far"], weights=[-9, 10]),
    ]
    with pytest.raises(UserError, match=r"overflow: the merged .* holds NaN or infinity"):
        merge_all(members)
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".lock")] == []
