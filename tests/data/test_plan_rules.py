"""Rules by which rows are split, limited and packed, each by a case in which another rule would give other rows."""

import random
from pathlib import Path

import pytest
from branches import branch

from branchmerge.config import SourceConfig
from branchmerge.data.packing import pack
from branchmerge.errors import UserError
from branchmerge.trajectories.sources import at_most, is_held_out


def test_documents_longer_than_a_third_of_a_row_come_before_shorter_ones() -> None:
    """Rows of ten: the fours are longer than a third, so they meet; in random order, one might meet two threes."""
    lengths = [4, 4, 3, 3, 3, 3]
    for seed in range(20):
        rows = pack(lengths, 10, random.Random(seed))
        assert sorted(sorted(lengths[d] for d in row) for row in rows) == [[3], [3, 3, 3], [4, 4]]


def test_a_document_of_a_third_of_a_row_is_a_short_one() -> None:
    """Rows of nine: were the threes placed first, they would always fill a row, and the nine ones another."""
    lengths = [3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    found = {
        tuple(sorted(sorted(lengths[d] for d in row) for row in pack(lengths, 9, random.Random(s)))[0])
        for s in range(20)
    }
    assert len(found) > 1


def test_the_split_of_a_file_is_by_the_first_byte_of_the_questions_sha256() -> None:
    """By sha256sum: of 4 + 4 b9 (185, a multiple of 5), of the others 72, 38, fc, 1b. Other rules leak test questions
    into what was trained on."""
    asked = [f"What is {n} + {n}?" for n in range(1, 6)]
    assert [is_held_out(question) for question in asked] == [False, False, False, True, False]
    assert is_held_out(" What  is\n4 + 4? ")


@pytest.mark.parametrize(
    ("own", "limit", "rows"), [(5, 10, 5), (10, 5, 5), (None, 5, 5), (5, None, 5), (None, None, None)]
)
def test_of_two_limits_the_smaller_one_counts(own: int | None, limit: int | None, rows: int | None) -> None:
    assert at_most(SourceConfig(path="rows.jsonl", limit=own), limit).limit == rows


def test_a_bound_itself_is_allowed_and_what_is_beyond_is_refused(tiny_student: Path, tmp_path: Path) -> None:
    config = branch(tiny_student, tmp_path, "domain=math", "seed=4294967295", "planning.mfu=1", "optim.betas=[0,0.999]")
    assert (config.seed, config.planning.mfu, config.optim.betas) == (4294967295, 1.0, [0.0, 0.999])
    for name, value in (
        ("seed", "4294967296"),
        ("seed", "-1"),
        ("planning.mfu", "1.001"),
        ("optim.betas", "[0.9,1]"),
        ("optim.lr", "inf"),
    ):
        with pytest.raises(UserError, match=name):
            branch(tiny_student, tmp_path, "domain=math", f"{name}={value}")
