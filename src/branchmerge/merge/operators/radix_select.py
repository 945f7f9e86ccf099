"""Exact order statistics of numbers that come in blocks, by radix selection; no block is kept in memory.

The bits of a float64, read as an integer, sort like the numbers. Each of four passes over the blocks counts the numbers
by 16 further bits, from the leading ones on, until all bits of the wanted number are known.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

DIGIT = 16
"""Bits determined in one pass."""
DIGITS = 64 // DIGIT
BUCKETS = 1 << DIGIT


def select(blocks: Callable[[], Iterable[Tensor]], places: Sequence[int]) -> list[float]:
    """The numbers at given places of the sorted sequence.

    Args:
        blocks: gives the same numbers at every call: float64 of any shape, on any device; no NaN
        places: indices into the sorted numbers

    Returns:
        The number at each place; zeros are equal, whatever their sign
    """
    prefixes = [0] * len(places)
    ranks = list(places)
    for digit in reversed(range(DIGITS)):
        shift = digit * DIGIT
        counts = dict.fromkeys(prefixes, torch.zeros(BUCKETS, dtype=torch.int64))
        for block in blocks():
            keys = _keys(block.reshape(-1))
            for prefix in counts:
                found = _digits(keys, shift, prefix if digit < DIGITS - 1 else None)
                counts[prefix] = counts[prefix] + torch.bincount(found, minlength=BUCKETS).cpu()
        for i, (prefix, rank) in enumerate(zip(prefixes, ranks, strict=True)):
            upto = counts[prefix].cumsum(0)
            bucket = int(torch.searchsorted(upto, rank, right=True))
            ranks[i] = rank - (int(upto[bucket - 1]) if bucket else 0)
            prefixes[i] = (prefix << DIGIT) | bucket
    return [_number(key) for key in prefixes]


def _digits(keys: Tensor, shift: int, prefix: int | None) -> Tensor:
    """The DIGIT bits above `shift` of those keys whose bits above them are `prefix`; of all where that is None."""
    if prefix is not None:
        above = shift + DIGIT
        keys = keys[((keys >> above) & ((1 << (64 - above)) - 1)) == prefix]
    return (keys >> shift) & (BUCKETS - 1)


def _keys(numbers: Tensor) -> Tensor:
    """float64 -> int64 whose 64 bits, read without a sign, are in the order of the numbers."""
    bits = numbers.contiguous().view(torch.int64)
    # Bits of negative numbers sort in reverse, so all of them are flipped; of other numbers only the sign bit is.
    return bits ^ ((bits >> 63) | torch.iinfo(torch.int64).min)


def _number(key: int) -> float:
    """The float64 of a key."""
    lowest = 1 << 63
    bits = key ^ lowest if key & lowest else ~key & (2 * lowest - 1)
    signed = bits - 2 * lowest if bits & lowest else bits
    return float(torch.tensor(signed, dtype=torch.int64).view(torch.float64))
