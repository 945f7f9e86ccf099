"""The loops of Arcee Fusion on a CPU, compiled by Numba: one sweep over a tensor each, nothing stored in between.

Every kernel takes tensors as they lie on disk, [R rows, C columns], float32 or the bits of bfloat16 in uint16, and
works on chunks of CHUNK columns that stay in the first-level cache. No kernel allows the compiler to reorder or fuse
floating-point operations (where they are fused it is written), and sums are taken in a fixed tree: the results are the
same bits on every machine and for any number of threads.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

CHUNK = 1024
"""Columns that are worked on at a time."""
LANES = CHUNK // 16
"""Sums that are kept side by side."""
FAST_X = 40.0
"""Weights above this are left to the float64 loop: their exponentials could overflow a float32 sum."""
FAST_D = (1e-15, 0.5)
"""Rows whose largest difference lies outside are left to it too: a square underflows, or the series ends."""
CANCELS = 0.1
"""Rows whose KL is this much smaller than its first summand, too: the float32 sums cancel."""
SCALE = 2.0**96
"""S is reckoned in float32 times this: products of a KL and a difference of fine-tunes lie far below 1."""
KEY_SHIFT = np.uint32(15)
"""A histogram's key: exponent and eight bits of the mantissa of |S|, mirrored for negative S."""
ZERO = np.uint32(1 << 16)
"""The key of zero, and of nothing else."""
KEYS = 1 << 17
SIGNLESS = np.uint32(0xFFFF)
"""Of a float's bits without the last KEY_SHIFT: all but the sign."""

F = np.float32


@intrinsic
def _float_of_bits(context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda c, build, sig, args: build.bitcast(args[0], ir.FloatType())


@intrinsic
def _bits_of_float(context: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda c, build, sig, args: build.bitcast(args[0], ir.IntType(32))


@intrinsic
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once: the same bits wherever it runs, which leaving it to the compiler would not be."""
    number = types.float32
    return number(number, number, number), lambda c, build, sig, args: build.fma(*args)


def number(stored):  # type: ignore[no-untyped-def]  # Numba compares the signatures
    """A stored element as a float32."""
    raise NotImplementedError("compiled code only")


@overload(number, inline="always")
def _number(stored):  # type: ignore[no-untyped-def]
    if isinstance(stored, types.Integer):  # bfloat16 is the upper half of a float32
        return lambda stored: _float_of_bits(np.uint32(stored) << np.uint32(16))
    return lambda stored: stored


compiled = njit(nogil=True, cache=True, error_model="numpy")
inlined = njit(nogil=True, cache=True, error_model="numpy", inline="always")


@inlined
def _exp(x: Any) -> Any:
    """exp(x) for |x| <= FAST_X in float32: the series of exp(r) with 2^k put into its exponent, x = k ln 2 + r."""
    shifted = _fma(x, F(1.4426950408889634), F(12582912.0))  # adding 1.5 * 2^23 rounds to the integer k
    k = shifted - F(12582912.0)
    r = _fma(k, F(2.12194440e-4), _fma(k, F(-0.693359375), x))  # ln 2 in two parts
    p = _fma(r, F(1 / 720), F(1 / 120))
    p = _fma(r, _fma(r, _fma(r, p, F(1 / 24)), F(1 / 6)), F(1 / 2))
    p = _fma(r, _fma(r, p, F(1)), F(1))
    return _float_of_bits(_bits_of_float(p) + (_bits_of_float(shifted) << np.uint32(23)))


@inlined
def _d_plus_expm1(d: Any) -> Any:
    """d + expm1(-d) = d^2/2 - d^3/6 + ... for |d| < 0.5, to float32."""
    q = _fma(d, _fma(d, F(1 / 40320), F(-1 / 5040)), F(1 / 720))
    q = _fma(d, _fma(d, q, F(-1 / 120)), F(1 / 24))
    return d * d * _fma(d, _fma(d, q, F(-1 / 6)), F(1 / 2))


@compiled
def _terms(x: Any, y: Any, e: Any, a: Any, b: Any) -> Any:
    """The summands of a row's KL, element by element.

    Returns:
        Whether a weight or a difference is too large for them, a difference is not too small, one is not zero.
    """
    large, enough, differ = False, False, False
    for i in range(x.size):
        u = number(x[i])
        d = u - number(y[i])
        weight = _exp(u)
        g = _d_plus_expm1(d)
        e[i] = weight
        a[i] = weight * g
        b[i] = weight * (g - d)
        large |= (abs(u) > FAST_X) | (abs(d) >= FAST_D[1])
        enough |= abs(d) >= FAST_D[0]
        differ |= d != 0
    return large, enough, differ


@compiled
def _sum(v: Any) -> float:
    """Sum of CHUNK values, added in pairs; changes them."""
    e = LANES
    for i in range(e):
        one = (v[i] + v[i + 8 * e]) + (v[i + 4 * e] + v[i + 12 * e])
        two = (v[i + 2 * e] + v[i + 10 * e]) + (v[i + 6 * e] + v[i + 14 * e])
        three = (v[i + e] + v[i + 9 * e]) + (v[i + 5 * e] + v[i + 13 * e])
        four = (v[i + 3 * e] + v[i + 11 * e]) + (v[i + 7 * e] + v[i + 15 * e])
        v[i] = (one + two) + (three + four)
    return _sum_of_lanes(v[:e])


@compiled
def _sum_of_lanes(v: Any) -> float:
    """Sum of LANES values, added in pairs; changes them."""
    width = v.size // 2
    while width >= 8:
        for i in range(width):
            v[i] += v[i + width]
        width //= 2
    total = 0.0
    for i in range(8):
        total += np.float64(v[i])
    return total


@compiled
def _kl_of_row(x: Any, y: Any, buffer: Any) -> float:
    """KL(softmax(x) || softmax(y)) of a row; see operators/row_kl.py for the formula."""
    Z = A = B = 0.0
    large, enough, differ = False, False, False
    for c in range(0, x.size, CHUNK):
        n = min(CHUNK, x.size - c)
        if n < CHUNK:
            buffer[:] = 0
        found = _terms(x[c : c + n], y[c : c + n], buffer[0], buffer[1], buffer[2])
        large, enough, differ = large | found[0], enough | found[1], differ | found[2]
        Z += _sum(buffer[0])
        A += _sum(buffer[1])
        B += _sum(buffer[2])
    if not differ:
        return 0.0
    A, s = A / Z, B / Z
    kl = A + (math.log1p(s) - s) if abs(s) > 0.01 else A - s * s * (1 / 2 - s * (1 / 3 - s * (1 / 4 - s / 5)))
    if enough and not large and kl >= CANCELS * A:
        return kl
    return _row_kl_float64(x, y)


@compiled
def _row_kl_float64(x: Any, y: Any) -> float:
    """The same for one row of any scale, in float64: with d centred, so that nothing large is subtracted."""
    top_x = top_y = -math.inf
    for i in range(x.size):
        top_x = max(top_x, np.float64(number(x[i])))
        top_y = max(top_y, np.float64(number(y[i])))
    Z_x = Z_y = mean = 0.0
    for i in range(x.size):
        u, v = np.float64(number(x[i])), np.float64(number(y[i]))
        e = math.exp(u - top_x)
        Z_x += e
        Z_y += math.exp(v - top_y)
        mean += e * (u - v)
    mean /= Z_x
    log_Z = top_x + math.log(Z_x)
    A = s = 0.0
    for i in range(x.size):
        u, v = np.float64(number(x[i])), np.float64(number(y[i]))
        d = (u - v) - mean
        p = math.exp(u - log_Z)
        if abs(d) < 0.01:
            g = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
            A += p * g
            s += p * (g - d)
        elif abs(d) < 0.5:
            A += p * (d + math.expm1(-d))
            s += p * math.expm1(-d)
        else:  # p alone may underflow where p exp(-d) does not
            t = math.exp(min(v + mean - log_Z, 700.0)) - p
            A += p * d + t
            s += t
    if s > 1.0:
        return top_y + math.log(Z_y) - log_Z + mean
    return max(A + (math.log1p(s) - s), 0.0) if abs(s) > 0.01 else max(A - s * s * (1 / 2 - s * (1 / 3 - s / 4)), 0.0)


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
    """The leading bits of a float32, in the order of the numbers."""
    bits = _bits_of_float(abs(value))
    steps = max(bits >> KEY_SHIFT, np.uint32(1)) if bits != 0 else np.uint32(0)
    return ZERO + steps if value >= 0 else ZERO - steps


@compiled
def measure(right: Any, left: Any, swapped: bool, known: bool, signed: bool, kl: Any, counts: Any) -> None:
    """Each row's KL into kl, and of each element the key of its S into counts, while the row is in the cache.

    Args:
        swapped: KL(Left || Right) in place of KL(Right || Left)
        known: kl is given
        counts: int32 [KEYS], is added to; empty for none
    """
    buffer = np.empty((3, CHUNK), np.float32)
    keys = np.empty(CHUNK, np.uint32)
    for r in range(right.shape[0]):
        if not known:
            kl[r] = _kl_of_row(left[r], right[r], buffer) if swapped else _kl_of_row(right[r], left[r], buffer)
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
    """Where in the order of all values the given places (ascending) fall.

    Returns:
        key, first place of that key, and number of values with it, int64 [places, 3]
    """
    found = np.zeros((places.size, 3), np.int64)
    total = np.zeros(CHUNK, np.int32)
    upto, next_ = np.int64(0), 0
    for start in range(0, counts.shape[1], CHUNK):
        total[:] = 0
        in_chunk = np.int64(0)
        for part in range(counts.shape[0]):
            for i in range(CHUNK):
                total[i] += counts[part, start + i]
        for i in range(CHUNK):
            in_chunk += total[i]
        # Few keys are near a place: most chunks are passed over as a whole.
        if next_ == places.size or places[next_] >= upto + in_chunk:
            upto += in_chunk
            continue
        for i in range(CHUNK):
            while next_ < places.size and places[next_] < upto + total[i]:
                found[next_] = start + i, upto, np.int64(total[i])
                next_ += 1
            upto += total[i]
    return found


@compiled
def scores(right: Any, left: Any, kl: Any, signed: bool, out: Any) -> None:
    """S of every element, scaled, into out, float32 [R, C]."""
    for r in range(right.shape[0]):
        k = _scaled(kl[r])
        for i in range(right.shape[1]):
            out[r, i] = _score(k, right[r, i], left[r, i], signed)


@compiled
def gather(right: Any, left: Any, kl: Any, signed: bool, wanted: Any, out: Any) -> int:
    """Copy every S, scaled, whose key is one of three, which are no zeros, to out; returns how many there are."""
    values = np.empty(CHUNK, np.float32)
    hits = np.zeros(CHUNK, np.uint8)
    hits_of_eight = hits.view(np.uint64)
    a, b, c_ = _bits_of_key(wanted[0]), _bits_of_key(wanted[1]), _bits_of_key(wanted[2])
    shared = min(a & SIGNLESS, b & SIGNLESS, c_ & SIGNLESS) <= 1  # its key is that of other bits, too
    found = 0
    for r in range(right.shape[0]):
        for c in range(0, right.shape[1], CHUNK):
            n = min(CHUNK, right.shape[1] - c)
            x, y, k = right[r, c : c + n], left[r, c : c + n], _scaled(kl[r])
            hits[n:] = 0
            if shared:
                _hits_by_key(x, y, k, signed, wanted, values, hits)
            else:
                _hits_by_bits(x, y, k, signed, a, b, c_, values, hits)
            for group in range(CHUNK // 8):
                if hits_of_eight[group]:
                    for i in range(8 * group, 8 * group + 8):
                        if hits[i]:
                            out[found] = values[i]
                            found += 1
    return found


@compiled
def _bits_of_key(key: Any) -> Any:
    """The leading bits of the numbers with a key."""
    return key - ZERO if key >= ZERO else ((SIGNLESS + np.uint32(1)) | (ZERO - key))


@compiled
def _hits_by_bits(x: Any, y: Any, k: Any, signed: bool, a: Any, b: Any, c: Any, values: Any, hits: Any) -> None:
    for i in range(x.size):
        value = _score(k, x[i], y[i], signed)
        leading = _bits_of_float(value) >> KEY_SHIFT
        values[i] = value
        hits[i] = (leading == a) | (leading == b) | (leading == c)


@compiled
def _hits_by_key(x: Any, y: Any, k: Any, signed: bool, wanted: Any, values: Any, hits: Any) -> None:
    """The same where a number so small that its leading bits are zero may be wanted, but zero is not."""
    for i in range(x.size):
        value = _score(k, x[i], y[i], signed)
        key = _key(value)
        values[i] = value
        hits[i] = (key == wanted[0]) | (key == wanted[1]) | (key == wanted[2])


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


@compiled
def choose(right: Any, left: Any, kl: Any, signed: bool, T: Any, strict: bool, out: Any, update: Any, norm: Any) -> Any:
    """out = Right where S >= T (strict: S > T), else Left, as they are stored.

    Args:
        T: scaled, and float32
        out: may be Right or Left itself
        update: float64 [R]; each row's ||out - Left||^2
        norm: float64 [R]; each row's ||Left||^2

    Returns:
        In how many elements Right was taken, and in how many out differs from Left.
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
            found = _choose_chunk(x, y, k, signed, T, strict, chosen, d, v)
            _copy(chosen, o)
            taken += found[0]
            changed += found[1]
            add_dot(d, d, squares[0])
            add_dot(v, v, squares[1])
        update[r], norm[r] = _sum_of_lanes(squares[0]), _sum_of_lanes(squares[1])
    return taken, changed


@compiled
def _copy(source: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = source[i]


@compiled
def _choose_chunk(x: Any, y: Any, k: Any, signed: bool, T: Any, strict: bool, o: Any, d: Any, v: Any) -> Any:
    """The same for a part of a row; d = o - y, v = y."""
    taken = changed = np.int32(0)
    for i in range(x.size):
        a, b = x[i], y[i]
        S = _score(k, a, b, signed)
        take = (S > T) if strict else (S >= T)
        o[i] = a if take else b
        d[i] = (number(a) - number(b)) if take else F(0)
        v[i] = number(b)
        taken += np.int32(take)
        changed += np.int32(d[i] != 0)
    return taken, changed
