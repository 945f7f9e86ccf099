"""A disk with room for only as many checkpoints as are kept: a branch moves on there, and never lets go of its last."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from disks import small_disk
from test_resume import folder_with

from branchmerge.student.checkpoints import CheckpointFolder, Position, generators, save_state

SIZE = 256
"""Of a square layer: 0.8 MB with moments, of which 2 MB hold two"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "2m") as place:
        yield place


def writers() -> dict[str, Callable[[Path], object]]:
    """What fills a folder; each tells a full disk by another kind of error."""
    model = torch.nn.Linear(SIZE, SIZE)
    optimizer = torch.optim.AdamW(model.parameters())
    return {
        "bytes": lambda partial: (partial / "state.pt").write_bytes(bytes(12 * SIZE**2)),
        "torch.save": lambda partial: torch.save(torch.zeros(3 * SIZE**2), partial / "state.pt"),
        "shards": lambda partial: save_state(partial, model, optimizer, generators()),
    }


def steps(folder: CheckpointFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.folder.glob("step-*"))


def wrote(folder: CheckpointFolder, step: int, fill: Callable[[Path], object]) -> bool:
    return folder.write(Position(step=step, seconds=1.0), lambda partial: [fill(partial)].clear())


@pytest.mark.parametrize("writer", ["bytes", "torch.save", "shards"])
def test_the_oldest_makes_room_for_the_next(writer: str, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, fill = folder_with(disk, keep_last=2), writers()[writer]
    there: list[list[int]] = []

    def watched(partial: Path) -> None:
        there.append(steps(folder))
        fill(partial)

    assert all(wrote(folder, step, watched) for step in (2, 4, 6, 8))
    assert there == [[], [2], [2, 4], [4], [4, 6], [6]]
    assert steps(folder) == [6, 8]
    found = folder_with(disk, keep_last=2).newest()
    assert found is not None and found.step == 8
    said = capsys.readouterr().out
    assert said.count("found no room") == 2 and "step-00000002 is removed for it" in said
    assert "cannot be written" not in said


def test_the_last_one_stays_where_there_is_room_for_no_other(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, fill = folder_with(disk, keep_last=2), writers()["bytes"]
    assert wrote(folder, 2, fill) and wrote(folder, 4, fill)
    for step in (6, 8):  # twice as large

        def twice(partial: Path) -> None:
            fill(partial)
            (partial / "more.pt").write_bytes(bytes(16 * SIZE**2))

        assert not wrote(folder, step, twice)
        assert steps(folder) == [4]
    assert capsys.readouterr().out.count("this checkpoint cannot be written") == 2
    found = folder.newest()
    assert found is not None and found.step == 4


def test_one_that_has_been_damaged_goes_before_older_ones(disk: Path) -> None:
    """It takes as much room, and those before it may be all that is left."""
    folder, fill = folder_with(disk, keep_last=2), writers()["bytes"]
    assert wrote(folder, 2, fill) and wrote(folder, 4, fill)
    with (folder.folder / "step-00000004" / "state.pt").open("r+b") as file:
        file.write(b"x")
    assert wrote(folder, 6, fill)
    assert steps(folder) == [2, 6]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_nothing_goes_where_room_is_not_what_lacks(number: int, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 2, 4)
    tries: list[Path] = []

    def fail(partial: Path) -> None:
        tries.append(partial)
        raise OSError(number, os.strerror(number))

    assert not wrote(folder, 6, fail)
    assert len(tries) == 1 and steps(folder) == [2, 4]


def test_a_quota_counts_as_a_full_disk(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, 2, 4)

    def fill(partial: Path) -> None:
        if 2 in steps(folder):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        (partial / "state.pt").write_bytes(b"weights")

    assert wrote(folder, 6, fill)
    assert steps(folder) == [4, 6]


def test_an_error_without_words_is_told_as_it_is(tmp_path: Path) -> None:
    def failing(_: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        wrote(folder_with(tmp_path), 1, failing)
