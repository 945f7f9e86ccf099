"""From the KL of the rows to the merged tensor: quartiles of S by a histogram, then Right where S passes T."""

from typing import Any

import numpy as np

from branchmerge.merge.kernels import (
    CHUNK,
    LANES,
    F,
    add_dot,
    bits_of_float,
    compiled,
    inlined,
    number,
    sum_of_lanes,
)
from branchmerge.merge.kl_kernels import kl_of_row

SCALE = 2.0**96
"""S is computed in float32, scaled by this: the product of a KL and a difference of fine-tunes is far below 1."""
KEY_SHIFT = 15
"""A histogram's key has the exponent and eight bits of the mantissa of |S|, rounded up, mirrored for negative S."""
ZERO = np.uint32(1 << 16)
"""The key of zero and, as keys are rounded up, of no other value."""
KEYS = (1 << 17) + CHUNK
"""More than the largest key, in whole chunks."""
GROUP = 32
"""Values that are checked at once for wanted keys."""


@inlined
def _score(kl: Any, right: Any, left: Any, signed: Any) -> Any:
    """S of an element, float32: its row's scaled KL times |Left - Right|, or times Left - Right."""
    d = number(left) - number(right)
    return kl * (d if signed else abs(d))


@inlined
def _scaled(kl: Any) -> Any:
    return F(kl * SCALE)


@inlined
def _key(value: Any) -> Any:
    """The leading bits of a float32; keys sort like the numbers."""
    steps = _rounded_up(bits_of_float(abs(value)))
    return ZERO + steps if value >= 0 else ZERO - steps


@inlined
def _rounded_up(bits: Any) -> Any:
    """Leading bits of a float, rounded up; only those of NaN could carry into the sign."""
    return (bits + np.uint32((1 << KEY_SHIFT) - 1)) >> np.uint32(KEY_SHIFT)


@compiled
def _bits_of_key(key: Any) -> Any:
    """The leading bits of the numbers with a key."""
    return key - ZERO if key >= ZERO else (ZERO | (ZERO - key))


@compiled
def measure(right: Any, left: Any, swapped: bool, known: bool, signed: bool, kl: Any, counts: Any) -> None:
    """Write each row's KL into kl, and count the key of each element's S in counts, while the row is in the cache.

    Args:
        swapped: KL(Left || Right) in place of KL(Right || Left)
        known: kl is given; else it is computed, and is NaN if a row of either model holds NaN or infinity
        counts: int32 [KEYS], to which counts are added; empty to count nothing
    """
    buffer = np.empty((3, CHUNK), np.float32)
    keys = np.empty(CHUNK, np.uint32)
    for r in range(right.shape[0]):
        if not known:
            kl[r] = kl_of_row(left[r], right[r], buffer) if swapped else kl_of_row(right[r], left[r], buffer)
        if counts.size:
            _count_row(right[r], left[r], _scaled(kl[r]), signed, keys, counts)


@compiled
def _count_row(right: Any, left: Any, kl: Any, signed: bool, keys: Any, counts: Any) -> None:
    for c in range(0, right.size, CHUNK):
        n = min(CHUNK, right.size - c)
        x, y = right[c : c + n], left[c : c + n]
        for i in range(n):
            keys[i] = _key(_score(kl, x[i], y[i], signed))
        for i in range(n):
            counts[keys[i]] += 1


@compiled
def locate(counts: Any, places: Any) -> Any:
    """Find the buckets of the given places (ascending) in the order of all values.

    Args:
        counts: int64 [KEYS]

    Returns:
        for each place its key, the first place with that key, and the number of values with it, int64 [places, 3]
    """
    found = np.zeros((places.size, 3), np.int64)
    upto, next_ = np.int64(0), 0
    for start in range(0, counts.size, CHUNK):
        chunk = counts[start : start + CHUNK]
        in_chunk = np.int64(0)
        for i in range(CHUNK):
            in_chunk += chunk[i]
        # Few keys are near a place, so most chunks are skipped as a whole.
        if next_ == places.size or places[next_] >= upto + in_chunk:
            upto += in_chunk
            continue
        for i in range(CHUNK):
            while next_ < places.size and places[next_] < upto + chunk[i]:
                found[next_] = start + i, upto, np.int64(chunk[i])
                next_ += 1
            upto += chunk[i]
    return found


@compiled
def scores(right: Any, left: Any, kl: Any, signed: bool, out: Any) -> None:
    """Write S of every element, scaled, into out, float32 [R, C]."""
    for r in range(right.shape[0]):
        k = _scaled(kl[r])
        for i in range(right.shape[1]):
            out[r, i] = _score(k, right[r, i], left[r, i], signed)


@compiled
def gather(right: Any, left: Any, kl: Any, signed: bool, wanted: Any, out: Any) -> int:
    """Copy every scaled S whose key is one of three into out; returns their number."""
    values = np.empty(CHUNK, np.float32)
    bits = values.view(np.uint32)
    first, second, third = _bits_of_key(wanted[0]), _bits_of_key(wanted[1]), _bits_of_key(wanted[2])
    found = 0
    for r in range(right.shape[0]):
        for c in range(0, right.shape[1], CHUNK):
            n = min(CHUNK, right.shape[1] - c)
            x, y, k = right[r, c : c + n], left[r, c : c + n], _scaled(kl[r])
            for i in range(n):
                values[i] = _score(k, x[i], y[i], signed)
            if n < CHUNK:
                values[n:] = np.nan  # its key is never wanted
            # Few values are wanted, so most groups are skipped as a whole.
            for start in range(0, n, GROUP):
                group, hit = bits[start : start + GROUP], np.uint32(0)
                for i in range(GROUP):
                    leading = _rounded_up(group[i])
                    hit |= np.uint32((leading == first) | (leading == second) | (leading == third))
                if hit:
                    for i in range(GROUP):
                        leading = _rounded_up(group[i])
                        if (leading == first) | (leading == second) | (leading == third):
                            out[found] = values[start + i]
                            found += 1
    return found


@compiled
def choose(right: Any, left: Any, kl: Any, signed: bool, T: Any, strict: bool, out: Any, update: Any, norm: Any) -> Any:
    """out = Right where S >= T (strict: S > T), else Left; stored values are copied.

    Args:
        T: the scaled threshold, float32
        out: may be Right or Left itself
        update: float64 [R]; each row's ||out - Left||^2
        norm: float64 [R]; each row's ||Left||^2

    Returns:
        The number of elements taken from Right, and the number that differ from Left.
    """
    taken = changed = 0
    d, v = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    chosen = np.empty(CHUNK, out.dtype)
    squares = np.empty((2, LANES))
    for r in range(right.shape[0]):
        squares[:] = 0
        k = _scaled(kl[r])
        for c in range(0, right.shape[1], CHUNK):
            n = min(CHUNK, right.shape[1] - c)
            if n < CHUNK:
                d[n:], v[n:] = 0, 0
            x, y, o = right[r, c : c + n], left[r, c : c + n], out[r, c : c + n]
            took = _choose_chunk(x, y, k, signed, T, strict, chosen, d, v)
            _copy(chosen, o)
            taken += took
            # Equal values have S = 0, which does not pass a positive T, so all that were taken differ.
            changed += took if T > 0 else _count_nonzero(d[:n])
            add_dot(d, d, squares[0])
            add_dot(v, v, squares[1])
        update[r], norm[r] = sum_of_lanes(squares[0]), sum_of_lanes(squares[1])
    return taken, changed


@compiled
def _copy(source: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = source[i]


@compiled
def _choose_chunk(x: Any, y: Any, k: Any, signed: bool, T: Any, strict: bool, o: Any, d: Any, v: Any) -> Any:
    """`choose` for a part of a row; d = o - y, v = y. Returns the number of elements taken from Right."""
    taken = np.int32(0)
    for i in range(x.size):
        a, b = x[i], y[i]
        S = _score(k, a, b, signed)
        take = (S > T) if strict else (S >= T)
        o[i] = a if take else b
        d[i] = (number(a) - number(b)) if take else F(0)
        v[i] = number(b)
        taken += np.int32(take)
    return taken


@compiled
def _count_nonzero(values: Any) -> Any:
    count = np.int32(0)
    for i in range(values.size):
        count += np.int32(values[i] != 0)
    return count
