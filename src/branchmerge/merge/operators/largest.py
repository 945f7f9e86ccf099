"""The k largest of many numbers: found once, then recognised block by block.

Equal numbers are ranked by their position, so that exactly k are taken, however many are equal: differences of bfloat16
models have few distinct values.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Largest:
    """All numbers above `value`, and the first `ties` of those equal to it."""

    value: float
    ties: int

    def taker(self) -> "Taker":
        return Taker(self)


class Taker:
    """Called with the blocks in order, marks the numbers that are among the largest."""

    def __init__(self, largest: Largest) -> None:
        self.value = largest.value
        self.ties = largest.ties

    def __call__(self, block: Tensor) -> Tensor:
        """float32 [n] -> bool [n]."""
        equal = block == self.value
        first = equal & (torch.cumsum(equal, 0) <= self.ties)
        self.ties -= int(first.sum())
        return (block > self.value) | first


def largest(numbers: NDArray[np.float32], *counts: int) -> list[Largest]:
    """For each count k, how to recognise the k largest numbers; reorders `numbers`.

    Raises:
        ValueError: a count is below zero or above the number of numbers
    """
    n = numbers.size
    if not all(0 <= k <= n for k in counts):
        raise ValueError(f"of {n} numbers one cannot take {counts}")
    places = sorted({n - k for k in counts if k})
    if places:
        numbers.partition(places)
    found = []
    for k in counts:
        value = float(numbers[n - k]) if k else float("inf")
        found.append(Largest(value, int((numbers[n - k :] == value).sum()) if k else 0))
    return found
