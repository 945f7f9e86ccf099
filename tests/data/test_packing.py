import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from branchmerge.data.packing import Plan, make_plan, pack

CAPACITY = 20
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=40)
SEEDS = st.integers(0, 1000)
BATCHES = st.integers(1, 5)
EPOCHS = st.integers(1, 3)


@given(LENGTHS, SEEDS)
def test_every_document_is_packed_exactly_once(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, CAPACITY, random.Random(seed))
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(rows)


@given(LENGTHS, SEEDS)
def test_no_row_is_over_capacity(lengths: list[int], seed: int) -> None:
    assert all(sum(lengths[d] for d in row) <= CAPACITY for row in pack(lengths, CAPACITY, random.Random(seed)))


@given(LENGTHS, SEEDS)
def test_no_two_rows_would_fit_into_one(lengths: list[int], seed: int) -> None:
    """A row is opened only when no other has room for the document."""
    tokens = [sum(lengths[d] for d in row) for row in pack(lengths, CAPACITY, random.Random(seed))]
    assert sum(2 * held <= CAPACITY for held in tokens) <= 1


def test_a_document_goes_to_the_fullest_row_with_room() -> None:
    """Rows of 7 and 6 tokens: the 3 fits both and must fill the 7 up."""
    for seed in range(20):
        assert {frozenset(row) for row in pack([6, 3, 7], 10, random.Random(seed))} == {
            frozenset({1, 2}),
            frozenset({0}),
        }


def test_short_documents_meet_whatever_their_length() -> None:
    """By length, rows of ten would have all threes, all twos or all ones but where one kind ends."""
    lengths = [1] * 30 + [2] * 30 + [3] * 30
    rows = pack(lengths, 10, random.Random(0))
    mixed = [row for row in rows if len({lengths[document] for document in row}) > 1]
    assert len(mixed) > 0.8 * len(rows)


def test_long_documents_come_first() -> None:
    """In the order given, 4 4 4 6 6 6 would take four rows of ten."""
    for seed in range(20):
        rows = pack([4, 4, 4, 6, 6, 6], 10, random.Random(seed))
        assert sorted(sorted([4, 4, 4, 6, 6, 6][d] for d in row) for row in rows) == [[4, 6]] * 3


def test_documents_of_one_length_and_rows_come_in_random_order() -> None:
    lengths = [4, 4, 4, 6, 6, 6]
    assert len({tuple(pack(lengths, 10, random.Random(seed))) for seed in range(20)}) > 10
    partners = {frozenset(frozenset(row) for row in pack(lengths, 10, random.Random(seed))) for seed in range(20)}
    assert len(partners) > 1


def test_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has 11 tokens, a row holds 10"):
        pack([3, 11], 10, random.Random(0))


@given(LENGTHS, BATCHES, EPOCHS, SEEDS)
def test_plan_is_the_same_for_the_same_seed(lengths: list[int], batch: int, epochs: int, seed: int) -> None:
    assert make_plan(lengths, CAPACITY, batch, epochs, None, seed) == make_plan(
        lengths, CAPACITY, batch, epochs, None, seed
    )


def test_plan_differs_between_seeds_and_between_epochs() -> None:
    lengths = [3 + number % 7 for number in range(60)]
    first, other = (make_plan(lengths, CAPACITY, 1, 2, None, seed).rows for seed in (1, 2))
    assert first != other
    rows_an_epoch = len(make_plan(lengths, CAPACITY, 1, 1, None, 1).rows)
    assert first[:rows_an_epoch] != first[rows_an_epoch:]


@given(LENGTHS, BATCHES, EPOCHS, SEEDS)
def test_plan_holds_every_document_once_an_epoch(lengths: list[int], batch: int, epochs: int, seed: int) -> None:
    plan = make_plan(lengths, CAPACITY, batch, epochs, None, seed)
    times = Counter(document for row in plan.rows for document in row)
    assert times == dict.fromkeys(range(len(lengths)), epochs)


@given(LENGTHS, BATCHES, EPOCHS, SEEDS)
def test_only_the_last_step_is_smaller(lengths: list[int], batch: int, epochs: int, seed: int) -> None:
    plan = make_plan(lengths, CAPACITY, batch, epochs, None, seed)
    assert all(len(step) == batch for step in plan.steps[:-1])
    assert all(1 <= len(step) <= batch for step in plan.steps[-1:])


@given(LENGTHS, BATCHES, EPOCHS, SEEDS, st.integers(1, 30))
def test_max_steps_cuts_the_same_plan_short(
    lengths: list[int], batch: int, epochs: int, seed: int, max_steps: int
) -> None:
    whole = make_plan(lengths, CAPACITY, batch, epochs, None, seed)
    assert make_plan(lengths, CAPACITY, batch, epochs, max_steps, seed).steps == whole.steps[:max_steps]


def test_max_steps_does_not_pack_epochs_that_are_never_reached() -> None:
    """A billion epochs would not end otherwise."""
    assert len(make_plan([5, 5, 5], 5, 2, 10**9, 4, 0).steps) == 4


def test_steps_may_span_epochs() -> None:
    plan = make_plan([5, 5, 5], 5, 2, 2, None, 0)
    assert [len(step) for step in plan.steps] == [2, 2, 2]


def test_rows_of_a_plan_stand_in_step_order() -> None:
    assert Plan((((0, 1), (2,)), ((3,),))).rows == [(0, 1), (2,), (3,)]
