"""Order statistics by radix selection against a full sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from branchmerge.merge.operators.radix_select import select

NUMBERS = arrays.arrays(np.float64, st.integers(1, 60), elements=st.floats(allow_nan=False))


@settings(deadline=None)
@given(numbers=NUMBERS, size=st.integers(1, 70), data=st.data())
def test_is_the_sorted_number(numbers: np.ndarray, size: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, numbers.size - 1), min_size=1, max_size=4))
    tensor = torch.from_numpy(numbers)
    assert select(lambda: tensor.split(size), places) == np.sort(numbers)[places].tolist()


def test_all_equal_and_neighbours_in_the_last_bit() -> None:
    one, above = 1.0, float(np.nextafter(1.0, 2.0))
    assert select(lambda: [torch.full((5,), 1e-9, dtype=torch.float64)], [0, 2, 4]) == [1e-9] * 3
    assert select(lambda: [torch.tensor([above, one], dtype=torch.float64)], [0, 1]) == [one, above]


@pytest.mark.parametrize("place", [0, 24_999, 50_000, 99_999])
def test_many_numbers_of_both_signs(place: int) -> None:
    numbers = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-8
    assert select(lambda: numbers.split(7_001), [place]) == [float(numbers.sort().values[place])]
