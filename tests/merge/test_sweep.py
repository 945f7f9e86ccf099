"""A sweep is merged in one pass over the experts, and every member comes out as if it were alone."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
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


def test_one_folder_spelled_twice_is_one(experts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for spelled in (tmp_path / "link" / "a", tmp_path / "b" / ".." / "a"):
        with pytest.raises(UserError, match="two members of this sweep would write it"):
            merge_all([recipe(experts, tmp_path / "a", lam=0.5), recipe(experts, spelled, lam=1.0)])


def test_more_members_than_a_process_may_open_files_at_first(experts: dict[str, Path], tmp_path: Path) -> None:
    """Each member holds its lock, and the file that it writes, to the end of the pass."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    names = ["math", "code"]
    try:
        folders = merge_all(
            [recipe(experts, tmp_path / str(number), "linear", names, anatomy=False) for number in range(70)]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(read_manifest(folder) for folder in folders)


def made(folder: Path) -> list[str]:
    """What lies in the folder of a sweep, but for locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def far_from(expert: Path, folder: Path) -> Path:
    """A model whose first tensor has numbers so large that ten times as much is infinity."""
    far = perturbed(expert, folder, 9)
    weights = load(far)
    weights["model.embed_tokens.weight"].fill_(1e38)
    save_file(weights, far / "model.safetensors")
    return far


def test_a_member_that_overflows_is_left_out_alone(experts: dict[str, Path], tmp_path: Path) -> None:
    folders = {"math": experts["math"], "far": far_from(experts["math"], tmp_path / "far")}

    def mean(out: Path, *weights: int):  # type: ignore[no-untyped-def]
        return recipe(folders, out, "linear", ["math", "far"], weights=list(weights))

    out = tmp_path / "out"
    members = [mean(out / "fine", 1, 1), mean(out / "overflow", -9, 10), mean(out / "also_fine", 3, 1)]
    with pytest.raises(
        UserError, match=r"1 of 3 members .* overflow: .*/overflow: the merged .* holds NaN or infinity"
    ):
        merge_all(members)
    assert made(out) == ["also_fine", "fine"]
    assert file_bytes(out / "fine") == file_bytes(merge(mean(tmp_path / "alone", 1, 1)))


def test_a_sweep_of_which_all_members_overflow_leaves_nothing(experts: dict[str, Path], tmp_path: Path) -> None:
    folders = {"math": experts["math"], "far": far_from(experts["math"], tmp_path / "far")}
    out = tmp_path / "out"
    members = [recipe(folders, out / str(w), "linear", ["math", "far"], weights=[1 - w, w]) for w in (10, 20)]
    with pytest.raises(UserError, match=r"2 of 2 members .* 10: .*; 20: "):
        merge_all(members)
    assert made(out) == []


def pair(folders: dict[str, Path], right: str, out: Path, operator: str = "linear"):  # type: ignore[no-untyped-def]
    """A recipe that knows of its own two models alone, as merge.py's do, so that each `right` is a group."""
    return recipe({leaf: folders[leaf] for leaf in ("code", right)}, out, operator, ["code", right])


def test_a_broken_parent_costs_only_its_own_members(experts: dict[str, Path], tmp_path: Path) -> None:
    broken = perturbed(experts["science"], tmp_path / "broken", 9)
    weights = load(broken)
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, broken / "model.safetensors")
    folders = {**experts, "science": broken}
    out = tmp_path / "out"
    members = [
        pair(folders, right, out / f"{operator}-{right}", operator)
        for operator in ("linear", "slerp")
        for right in ("science", "math")
    ]
    with pytest.raises(UserError, match=r"2 of 4 members .* linear-science, slerp-science: .* holds NaN"):
        merge_all(members)
    assert made(out) == ["linear-math", "slerp-math"]


def test_models_that_do_not_fit_are_told_before_the_first_group_is_merged(
    experts: dict[str, Path], student_factory: Callable[..., Path], tmp_path: Path
) -> None:
    wide = student_factory(tmp_path / "wide", hidden_size=64)
    folders = {**experts, "wide": wide}
    members = [pair(folders, right, tmp_path / "out" / right) for right in ("math", "wide")]
    with pytest.raises(UserError, match="wide"):
        merge_all(members)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_told_before_the_first_group_is_merged(
    experts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out" / "science").mkdir(parents=True)
    (tmp_path / "out" / "science" / "mine.txt").write_text("mine")
    members = [pair(experts, right, tmp_path / "out" / right) for right in ("math", "science")]
    with pytest.raises(UserError, match="is no result of branchmerge"):
        merge_all(members)
    assert made(tmp_path / "out") == ["science"]
