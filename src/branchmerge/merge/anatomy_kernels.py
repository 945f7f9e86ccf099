"""The loops that compare a merged tensor with its leaves and backbone, in one pass and without intermediate tensors.

Tensors are flat, float32, float64, or the bits of bfloat16 in uint16. They are processed in chunks that stay in the
first-level cache: elementwise in float32, sums of sixteen products in float32 (pairwise), sums of these in float64.
Shapes: K leaves; M = K + 1, the leaves and the merged model.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from branchmerge.merge.kernels import CHUNK, LANES, add_dot, compiled, number


def bits(stored):  # type: ignore[no-untyped-def]  # Numba compares the signatures
    """An array of stored elements as integers."""
    raise NotImplementedError("compiled code only")


@overload(bits)
def _bits(stored):  # type: ignore[no-untyped-def]
    if isinstance(stored.dtype, types.Integer):
        return lambda stored: stored
    if stored.dtype == types.float32:
        return lambda stored: stored.view(np.uint32)
    return lambda stored: stored.view(np.uint64)


@compiled
def difference(a: Any, b: Any) -> Any:
    """For two flat tensors: the number of elements that differ, ||a - b||^2 and ||b||^2."""
    buffer = np.zeros((2, CHUNK), np.float32)
    squares = np.zeros((2, LANES))
    changed = 0
    for start in range(0, a.size, CHUNK):
        x, y = a[start : start + CHUNK], b[start : start + CHUNK]
        if x.size < CHUNK:
            buffer[:] = 0
        changed += _subtract(x, y, buffer[0], buffer[1])
        add_dot(buffer[0], buffer[0], squares[0])
        add_dot(buffer[1], buffer[1], squares[1])
    return changed, _sum(squares[0]), _sum(squares[1])


@compiled
def _subtract(x: Any, y: Any, d: Any, copy: Any) -> int:
    changed = 0
    for i in range(x.size):
        u, v = number(x[i]), number(y[i])
        d[i] = u - v
        copy[i] = v
        changed += u != v
    return changed


@compiled
def compare(models: Any, base: Any, taken: Any, gram: Any, signs: Any) -> None:
    """Add a part of a tensor to the counts and products of a merged tensor.

    Args:
        models: the leaves and the merged model, M flat tensors in a tuple
        base: the backbone's tensor; empty where there is none
        taken: int64 [M, M]; where leaves differ, how often merged == leaf_j == leaf_k; in the last place how often they
            differ
        gram: float64 [M, M]; upper half: the products of the task vectors W - W_0
        signs: int64 [M]; how often merged - W_0 and leaf_k - W_0 have one sign that is not zero; last: how often
            merged - W_0 is not zero
    """
    merged, K = models[-1], len(models) - 1
    equal = np.zeros((K + 1, CHUNK), np.uint8)  # the last: where the leaves differ
    d = np.zeros((K + 1, CHUNK), np.float32)
    products = np.zeros((K + 1, K + 1, LANES))
    agreeing = np.zeros((K + 1, LANES), np.int32)  # enough for 2^31 elements a lane
    for start in range(0, merged.size, CHUNK):
        m, first = merged[start : start + CHUNK], models[0][start : start + CHUNK]
        equal[K] = 0
        if m.size < CHUNK:
            equal[:], d[:] = 0, 0
        for k in range(K):
            _match(models[k][start : start + CHUNK], m, first, equal[k], equal[K])
        for j in range(K + 1):
            for k in range(j, K + 1):
                if k < K or j == K:
                    taken[j, k] += _both(equal[j], equal[k], equal[K])
        if base.size == 0:
            continue
        origin = base[start : start + CHUNK]
        for k in range(K + 1):
            _task_vector(models[k][start : start + CHUNK], origin, d[k])
        for k in range(K + 1):
            _add_agreeing(d[k], d[K], agreeing[k])
            for j in range(k + 1):
                add_dot(d[j], d[k], products[j, k])
    for k in range(K + 1):
        signs[k] += _sum(agreeing[k])
        for j in range(k + 1):
            gram[j, k] += _sum(products[j, k])


@compiled
def _match(x: Any, merged: Any, first: Any, equal: Any, differ: Any) -> None:
    """equal = x == merged; differ |= x != first; bit for bit."""
    u, v, w = bits(x), bits(merged), bits(first)
    for i in range(u.size):
        equal[i] = u[i] == v[i]
        differ[i] |= u[i] != w[i]


@compiled
def _task_vector(x: Any, base: Any, d: Any) -> None:
    for i in range(x.size):
        d[i] = number(x[i]) - number(base[i])


@compiled
def _add_agreeing(a: Any, b: Any, lanes: Any) -> None:
    """Add to int32 [LANES] the number of CHUNK places where both are above zero, or both below."""
    for i in range(LANES):
        for start in range(0, CHUNK, LANES):
            x, y = a[start + i], b[start + i]
            lanes[i] += np.int32((min(x, y) > 0) | (max(x, y) < 0))


@compiled
def _both(a: Any, b: Any, c: Any) -> int:
    """The number of CHUNK bytes, 0 or 1 each, in which all three are 1."""
    x, y, z = a.view(np.uint64), b.view(np.uint64), c.view(np.uint64)
    lanes = np.uint64(0)  # eight counters of a byte: each stays below 256, as CHUNK / 8 does
    for i in range(x.size):
        lanes += x[i] & y[i] & z[i]
    low = np.uint64(0x00FF00FF00FF00FF)
    fours = (lanes & low) + ((lanes >> np.uint64(8)) & low)
    return int((fours * np.uint64(0x0001000100010001)) >> np.uint64(48))  # the sum of the four


@compiled
def _sum(lanes: Any) -> Any:
    """Sum of LANES values, one after the other."""
    total = lanes[0] - lanes[0]
    for value in lanes:
        total += value
    return total
