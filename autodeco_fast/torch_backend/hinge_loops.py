"""The Min-P hinge and its slope, for one CPU core: blocks of rows that lie in its cache."""

import numpy as np

from .jit import compiled

ROWS = 1 << 12  # of a block; their sums are taken together
_SUMS = {"reassoc", "contract", "nsz"}  # lets a sum run in several lanes


@compiled(fastmath=_SUMS)
def hinge(
    first,  # block that this call begins with
    last,  # block before which it ends
    temperature,  # [N] fp32, as the next where nothing else is said
    gap,
    rank,  # [N] int64
    weight,  # or [0]
    loss,  # written, as the next two
    slope,
    sums,  # [2, blocks] fp64: Σ loss, Σ weight
    inv,
    gravity,
    power,
    limit,
    clip,
):
    """Some blocks of rows, each in passes that write one array: those run in vector lanes."""
    zero, one, two = np.float32(0), np.float32(1), np.float32(2)
    reach = np.float32(np.inf) if clip else limit
    room = np.ones(ROWS, np.float32)
    for block in range(first, last):
        here = slice(block * ROWS, min((block + 1) * ROWS, len(gap)))
        T, gaps, ranks, h, d = temperature[here], gap[here], rank[here], loss[here], slope[here]
        w, total, weights = room[: len(T)], zero, zero
        if len(weight):
            w[:] = weight[here]
        else:
            w[:] = one
        for i in range(len(w)):
            w[i] = zero if ranks[i] < 0 or gaps[i] * inv > reach else w[i]
            weights += w[i]
        for i in range(len(w)):
            required = gaps[i] * inv
            x = (limit if required > limit else required) - T[i]  # a NaN stays one
            h[i] = zero if x <= 0 else x
        if power == 1:
            for i in range(len(w)):
                d[i] = -one if h[i] > 0 else zero
        else:
            for i in range(len(w)):
                d[i] = -two * h[i]
            for i in range(len(w)):
                h[i] *= h[i]
        for i in range(len(w)):  # 0 and not NaN where the loss is infinite
            d[i] = zero if w[i] == 0 else (d[i] + gravity) * w[i]
        for i in range(len(w)):
            h[i] = zero if w[i] == 0 else (h[i] + gravity * T[i]) * w[i]
            total += h[i]
        sums[0, block], sums[1, block] = total, weights
