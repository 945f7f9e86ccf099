"""Common parts of the loops compiled by Numba: stored elements, floats and their bits, sums in a fixed order.

The loops of Arcee Fusion are in kl_kernels.py and selection_kernels.py, those of the anatomy in anatomy_kernels.py.
Every kernel takes tensors as they lie on disk, [R rows, C columns], float32 or the bits of bfloat16 in uint16, and
works on chunks of CHUNK columns that stay in the first-level cache. The compiler may not reorder or fuse floating-point
operations (fused ones are explicit), and sums are taken in a fixed tree, so the results are the same bits on every
machine and for any number of threads.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic, overload

CHUNK = 1024
"""Columns that are processed at a time."""
LANES = CHUNK // 16
"""Number of partial sums."""
F = np.float32


@intrinsic
def float_of_bits(context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda c, build, sig, args: build.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of_float(context: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda c, build, sig, args: build.bitcast(args[0], ir.IntType(32))


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once; explicit, so that the bits do not depend on what the compiler chooses to fuse."""
    number = types.float32
    return number(number, number, number), lambda c, build, sig, args: build.fma(*args)


def number(stored):  # type: ignore[no-untyped-def]  # Numba compares the signatures
    """A stored element as a float32."""
    raise NotImplementedError("compiled code only")


@overload(number, inline="always")
def _number(stored):  # type: ignore[no-untyped-def]
    if isinstance(stored, types.Integer):  # bfloat16 is the upper half of a float32
        return lambda stored: float_of_bits(np.uint32(stored) << np.uint32(16))
    return lambda stored: stored


def _cache_folder() -> Path:
    """Numba's cache folder for this version of all kernels. Numba checks only a function's own file for changes, but
    inlines functions from other files."""
    sources = Path(__file__).parent
    content = b"".join(path.read_bytes() for path in sorted(sources.glob("*kernels.py")))
    kept = Path(config.CACHE_DIR) if config.CACHE_DIR else sources / "__pycache__"
    return kept / f"kernels-{hashlib.sha256(content).hexdigest()[:12]}"


config.CACHE_DIR = str(_cache_folder())
compiled = njit(nogil=True, cache=True, error_model="numpy")
inlined = njit(nogil=True, cache=True, error_model="numpy", inline="always")


@compiled
def sum_of_chunk(v: Any) -> float:
    """Sum of CHUNK values, added in pairs; changes them."""
    e = LANES
    for i in range(e):
        one = (v[i] + v[i + 8 * e]) + (v[i + 4 * e] + v[i + 12 * e])
        two = (v[i + 2 * e] + v[i + 10 * e]) + (v[i + 6 * e] + v[i + 14 * e])
        three = (v[i + e] + v[i + 9 * e]) + (v[i + 5 * e] + v[i + 13 * e])
        four = (v[i + 3 * e] + v[i + 11 * e]) + (v[i + 7 * e] + v[i + 15 * e])
        v[i] = (one + two) + (three + four)
    return sum_of_lanes(v[:e])


@compiled
def sum_of_lanes(v: Any) -> float:
    """Sum of LANES values, added in pairs, the last eight in float64; changes them."""
    e = LANES // 4
    for i in range(e):
        v[i] = (v[i] + v[i + 2 * e]) + (v[i + e] + v[i + 3 * e])
    for i in range(e // 2):
        v[i] += v[i + e // 2]
    left = (np.float64(v[0]) + np.float64(v[1])) + (np.float64(v[2]) + np.float64(v[3]))
    return left + ((np.float64(v[4]) + np.float64(v[5])) + (np.float64(v[6]) + np.float64(v[7])))


@compiled
def special(bits: Any, exponent: Any) -> bool:
    """Whether a float whose bits are given has all exponent bits set, as NaN and infinity have."""
    for start in range(0, bits.size, CHUNK):
        chunk = bits[start : start + CHUNK]
        found = False
        for i in range(chunk.size):
            found |= (chunk[i] & exponent) == exponent
        if found:
            return True
    return False


@compiled
def add_dot(a: Any, b: Any, lanes: Any) -> None:
    """Add the products of CHUNK values to float64 [LANES]: sixteen to each, added in pairs in float32."""
    e = LANES
    for i in range(e):
        one = (a[i] * b[i] + a[i + e] * b[i + e]) + (a[i + 2 * e] * b[i + 2 * e] + a[i + 3 * e] * b[i + 3 * e])
        two = (a[i + 4 * e] * b[i + 4 * e] + a[i + 5 * e] * b[i + 5 * e]) + (
            a[i + 6 * e] * b[i + 6 * e] + a[i + 7 * e] * b[i + 7 * e]
        )
        three = (a[i + 8 * e] * b[i + 8 * e] + a[i + 9 * e] * b[i + 9 * e]) + (
            a[i + 10 * e] * b[i + 10 * e] + a[i + 11 * e] * b[i + 11 * e]
        )
        four = (a[i + 12 * e] * b[i + 12 * e] + a[i + 13 * e] * b[i + 13 * e]) + (
            a[i + 14 * e] * b[i + 14 * e] + a[i + 15 * e] * b[i + 15 * e]
        )
        lanes[i] += np.float64((one + two) + (three + four))
