"""KL of a row of one model to the same row of another, as a compiled loop; the formula is in operators/row_kl.py.

Elementwise in float32, sums in float64; rows for which that is not accurate enough, all in float64.
"""

import math
from typing import Any

import numpy as np

from branchmerge.merge.kernels import (
    CHUNK,
    F,
    bits_of_float,
    compiled,
    float_of_bits,
    fma,
    inlined,
    number,
    sum_of_chunk,
)

FAST_X = np.float32(40)
"""Rows with weights above this use the float64 loop: their exponentials could overflow a float32 sum."""
FAST_D = (np.float32(1e-15), np.float32(0.5))
"""Rows whose largest difference lies outside this range use it, too: a square underflows, or the series is too
short."""
GENTLE_X, GENTLE_D = np.float32(0.34), np.float32(1 / 64)
"""Weights and differences up to these allow shorter series; most chunks of a checkpoint have no larger ones."""
CANCELS = 0.1
"""Rows whose KL is this much smaller than its first term use it, too: the float32 sums cancel."""


@inlined
def _exp_of_remainder(r: Any) -> Any:
    """exp(r) for |r| <= ln 2 / 2, by its series."""
    p = fma(r, F(1 / 720), F(1 / 120))
    p = fma(r, fma(r, fma(r, p, F(1 / 24)), F(1 / 6)), F(1 / 2))
    return fma(r, fma(r, p, F(1)), F(1))


@inlined
def _exp(x: Any) -> Any:
    """exp(x) for |x| <= FAST_X in float32: the series of exp(r) with 2^k put into its exponent, x = k ln 2 + r."""
    shifted = fma(x, F(1.4426950408889634), F(12582912.0))  # adding 1.5 * 2^23 rounds to the integer k
    k = shifted - F(12582912.0)
    r = fma(k, F(2.12194440e-4), fma(k, F(-0.693359375), x))  # ln 2 in two parts
    return float_of_bits(bits_of_float(_exp_of_remainder(r)) + (bits_of_float(shifted) << np.uint32(23)))


@inlined
def _d_plus_expm1(d: Any) -> Any:
    """d + expm1(-d) = d^2/2 - d^3/6 + ... for |d| < 0.5, to float32."""
    q = fma(d, fma(d, F(1 / 40320), F(-1 / 5040)), F(1 / 720))
    q = fma(d, fma(d, q, F(-1 / 120)), F(1 / 24))
    return d * d * fma(d, fma(d, q, F(-1 / 6)), F(1 / 2))


@compiled
def _gentle_terms(x: Any, y: Any, e: Any, a: Any, b: Any) -> Any:
    """`_terms` where all weights are at most GENTLE_X, all differences GENTLE_D.

    Returns:
        The largest of each; NaN, if there is one.
    """
    top_u = top_d = np.uint32(0)  # non-negative floats sort like their bits
    for i in range(x.size):
        u = number(x[i])
        d = u - number(y[i])
        weight = _exp_of_remainder(u)
        g = d * d * fma(d, fma(d, fma(d, F(-1 / 120), F(1 / 24)), F(-1 / 6)), F(1 / 2))
        e[i] = weight
        a[i] = weight * g
        b[i] = weight * (g - d)
        top_u = max(top_u, bits_of_float(abs(u)))
        top_d = max(top_d, bits_of_float(abs(d)))
    return float_of_bits(top_u), float_of_bits(top_d)


@compiled
def _terms(x: Any, y: Any, e: Any, a: Any, b: Any) -> Any:
    """The summands of a row's KL, element by element: e = exp(x), a = e (d + expm1(-d)), b = e expm1(-d).

    Returns:
        Whether a weight or a difference is too large for these series, and whether a difference is large enough.
    """
    large, enough = False, False
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
    return large, enough


@compiled
def kl_of_row(x: Any, y: Any, buffer: Any) -> float:
    """KL(softmax(x) || softmax(y)) of a row; see operators/row_kl.py for the formula."""
    Z = A = B = 0.0
    large, enough = False, False
    for c in range(0, x.size, CHUNK):
        n = min(CHUNK, x.size - c)
        if n < CHUNK:
            buffer[:] = 0
        top_u, top_d = _gentle_terms(x[c : c + n], y[c : c + n], buffer[0], buffer[1], buffer[2])
        if top_u <= GENTLE_X and top_d <= GENTLE_D:
            enough |= top_d >= FAST_D[0]
        else:
            found = _terms(x[c : c + n], y[c : c + n], buffer[0], buffer[1], buffer[2])
            large, enough = large | found[0], enough | found[1]
        Z += sum_of_chunk(buffer[0])
        A += sum_of_chunk(buffer[1])
        B += sum_of_chunk(buffer[2])
    if not enough and _equal(x, y):
        return 0.0
    A, s = A / Z, B / Z
    kl = A + (math.log1p(s) - s) if abs(s) > 0.01 else A - s * s * (1 / 2 - s * (1 / 3 - s * (1 / 4 - s / 5)))
    if enough and not large and kl >= CANCELS * A:
        return kl
    return _row_kl_float64(x, y)


@compiled
def _equal(x: Any, y: Any) -> bool:
    """Whether two rows are the same finite numbers; NaN and infinity must show in the KL."""
    differ = False
    for i in range(x.size):
        differ |= number(x[i]) - number(y[i]) != F(0)
    return not differ


@compiled
def _row_kl_float64(x: Any, y: Any) -> float:
    """The KL of one row of any scale, in float64; d is centred, so that nothing large cancels."""
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
