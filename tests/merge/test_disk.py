"""A disk that fills up, a quota, a place that cannot be written to: one clear line, and nothing is left."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from disks import small_disk
from safetensors.torch import save_file

from branchmerge.errors import UserError
from branchmerge.merge import Recipe, merge, merge_all
from branchmerge.merge.operators.linear import Linear
from branchmerge.merge.tree import parse
from branchmerge.study import read_manifest, weights_sha256

TENSORS = 6
MIB = 1 << 20


@dataclass(frozen=True)
class Hog(Linear):
    """A mean beside which something else fills the disk."""

    disk: ClassVar[Path]
    at: ClassVar[int]
    """Number of the tensor at which the disk fills up."""
    done: ClassVar[int] = 0

    def apply(self, measured: Any, models: Any, base: Any = None) -> Any:
        if models[0].numel() > 1:  # not the recipe's dry run
            Hog.done += 1
            if Hog.done == Hog.at:
                fill(Hog.disk / "hog")
        return super().apply(measured, models, base)


def fill(path: Path) -> None:
    """Write until there is no room."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


def parents(root: Path) -> dict[str, Path]:
    """Two models of six tensors of a mebibyte."""
    folders = {}
    for seed, leaf in enumerate(("a", "b")):
        folders[leaf] = root / leaf
        folders[leaf].mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        weights = {f"layer.{i}": torch.randn(512, 512, generator=generator) for i in range(TENSORS)}
        save_file(weights, folders[leaf] / "model.safetensors")
        (folders[leaf] / "config.json").write_text('{"model_type": "llama"}')
        (folders[leaf] / "tokenizer.json").write_text('{"model": {"vocab": {}}, "padding": "' + "x" * 300_000 + '"}')
    return folders


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "9m") as place:
        yield place


def recipe(folders: dict[str, Path], out: Path, shard: int, operator: Linear | None = None) -> Recipe:
    made = Linear() if operator is None else operator
    return Recipe("linear", made, parse(["a", "b"]), folders, out, None, shard, progress=False)


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(".lock"))


@pytest.mark.parametrize("at", [1, 3, TENSORS])
@pytest.mark.parametrize("shard", [MIB + 4096, 1 << 30], ids=["shards", "one file"])
def test_a_disk_that_fills_up_is_named_and_nothing_is_left(tmp_path: Path, disk: Path, at: int, shard: int) -> None:
    folders = parents(tmp_path / "parents")
    before = {leaf: weights_sha256(folder) for leaf, folder in folders.items()}
    Hog.disk, Hog.at, Hog.done = disk, at, 0
    with pytest.raises(UserError, match="No space left on device") as raised:
        merge(recipe(folders, disk / "results" / "out", shard, Hog()))
    said = str(raised.value)
    assert f"{disk / 'results'}" in said and "make room on that disk" in said and "\n" not in said
    assert contents(disk) == ["hog", "results"]
    assert before == {leaf: weights_sha256(folder) for leaf, folder in folders.items()}
    elsewhere = merge(recipe(folders, tmp_path / "elsewhere", shard))
    (disk / "hog").unlink()
    again = merge(recipe(folders, disk / "results" / "out", shard))
    assert weights_sha256(again) == weights_sha256(elsewhere)
    assert contents(again) == contents(elsewhere)


def test_a_disk_that_is_too_small_is_seen_at_once(tmp_path: Path, disk: Path) -> None:
    fill(disk / "hog")
    with (disk / "hog").open("r+b") as file:
        file.truncate(4 * MIB)
    with pytest.raises(UserError, match=r"the merged model takes .* GB, the disk has .* GB left"):
        merge(recipe(parents(tmp_path / "parents"), disk / "out", MIB))
    assert contents(disk) == ["hog"]


def test_a_disk_that_is_too_small_for_all_of_a_sweep_is_seen_at_once(tmp_path: Path, disk: Path) -> None:
    """One fits, so that the second would fill it up at the end of the pass."""
    folders = parents(tmp_path / "parents")
    weights = [(1.0, 1.0), (1.0, 2.0)]
    recipes = [recipe(folders, disk / f"out{n}", 1 << 30, Linear(pair)) for n, pair in enumerate(weights)]
    with pytest.raises(UserError, match=r"2 merged models take .* GB, the disk has .* GB left"):
        merge_all(recipes)
    assert contents(disk) == []
    assert contents(merge(recipes[0]))


def test_a_place_that_may_not_be_written_to_is_named(tmp_path: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UserError, match="Read-only file system") as raised:
        merge(recipe(parents(tmp_path / "parents"), disk / "out", MIB))
    assert str(disk) in str(raised.value)


LIMITED = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    from branchmerge.errors import UserError
    from branchmerge.merge import Recipe, merge
    from branchmerge.merge.operators.linear import Linear
    from branchmerge.merge.tree import parse

    out, limit, shard = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folders = {Path(folder).name: Path(folder) for folder in sys.argv[4:]}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        merge(Recipe("linear", Linear(), parse(["a", "b"]), folders, out, None, shard, progress=False))
    except UserError as error:
        sys.exit(f"error: {error}")
    """
)


def limited(out: Path, limit: int, shard: int, folders: dict[str, Path]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(out), str(limit), str(shard), *map(str, folders.values())]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})


def test_a_limit_of_file_sizes_is_named_and_smaller_shards_fit(tmp_path: Path) -> None:
    folders, out = parents(tmp_path / "parents"), tmp_path / "results" / "out"
    refused = limited(out, 2 * MIB, 1 << 30, folders)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {out.parent}: cannot write") and "File too large" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert contents(out.parent) == []
    fits = limited(out, 2 * MIB, MIB + 4096, folders)
    assert (fits.returncode, fits.stderr) == (0, "")
    manifest = read_manifest(out)
    assert manifest is not None and manifest.weights_sha256 == weights_sha256(out)
