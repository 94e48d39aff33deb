"""The sums that row statistics are made of, from tiles of fp32 logits: two passes over a row that
lies in a core's cache.

    1. the largest logit, its first place, and how many exceed a threshold;
    2. Σ e^x and Σ e^x x with x = z − m; at a temperature also Σ e^{x/T} (x/T)^k for k = 0, 1, 2;
       with a cut only these, of logits above the threshold.

m is the largest logit so far: for a new one, earlier sums move as in `stats.py`. A NaN
makes all sums NaN.
"""

import math

import numpy as np

from .jit import compiled

NOTHING = np.float32(-1e30)  # stands for a maximum of −inf, so that differences are finite
_LOWEST = np.float32(-87.0)  # e^x is about 0 there, and a normal number
_BLOCK = 512  # logits of which the maximum is known before its place is looked for
_MAGNITUDE, _SIGN = np.int32(0x7FFFFFFF), np.int32(31)
_MINUS_ZERO, _ZERO = np.int32(-1), np.int32(0)  # of the floats, in the order of `_largest`
_LOG2_E, _LN2_HIGH, _LN2_LOW = (
    np.float32(1.4426950408889634),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)
_C2, _C3, _C4 = (
    np.float32(5.0000001201e-1),
    np.float32(1.6666665459e-1),
    np.float32(4.1665795894e-2),
)
_C5, _C6, _C7 = (
    np.float32(8.3334519073e-3),
    np.float32(1.3981999507e-3),
    np.float32(1.9875691500e-4),
)
_SUMS = {"reassoc", "contract", "nsz"}  # lets a sum run in several lanes


@compiled(fastmath=_SUMS, inline="always")
def _exp(x):
    """e^x for −87 ≤ x ≤ 0: 2^k e^r with |r| ≤ ½ ln 2, and the polynomial of Cephes' expf; it runs
    in vector lanes."""
    k = np.floor(x * _LOG2_E + _HALF)
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    p = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
    power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + _ONE) * power


@compiled(fastmath=_SUMS, inline="always")
def _sums(row, m):
    """Σ e^x, Σ e^x x."""
    s, t = np.float32(0), np.float32(0)
    for j in range(len(row)):
        x = row[j] - m
        x = _LOWEST if x < _LOWEST else x
        e = _exp(x)
        s += e
        t += e * x
    return s, t


@compiled(fastmath=_SUMS, inline="always")
def _scaled_sums(row, m, inverse):
    """Σ e^x, Σ e^x x, Σ e^x x² of x = (z − m)/T."""
    s, t, q = np.float32(0), np.float32(0), np.float32(0)
    for j in range(len(row)):
        x = (row[j] - m) * inverse
        x = _LOWEST if x < _LOWEST else x
        e = _exp(x)
        s += e
        t += e * x
        q += e * x * x
    return s, t, q


@compiled(fastmath=_SUMS, inline="always")
def _cut_sums(row, m, inverse, threshold):
    """The same of logits above the threshold."""
    s, t, q = np.float32(0), np.float32(0), np.float32(0)
    for j in range(len(row)):
        x = (row[j] - m) * inverse
        x = _LOWEST if x < _LOWEST else x
        e = _exp(x) if row[j] > threshold else np.float32(0)
        s += e
        t += e * x
        q += e * x * x
    return s, t, q


@compiled(inline="always")
def _turned(word):
    """The bits of negative floats turned over, but for the sign: integers in the order of the
    floats. Its own inverse."""
    return np.int32(word ^ ((word >> _SIGN) & _MAGNITUDE))


@compiled()
def _largest(row, bits, threshold):
    """The maximum, where the block that holds it first begins, and how many exceed the threshold.

    Maxima are taken of integers in the order of the floats, among which −0 comes before 0: blocks
    that hold one each tie.
    """
    most, where, count = np.int32(-(2**31)), 0, 0
    for start in range(0, len(row), _BLOCK):
        values, words = row[start : start + _BLOCK], bits[start : start + _BLOCK]
        top, above = np.int32(-(2**31)), np.int32(0)
        for j in range(len(values)):
            top = max(top, _turned(words[j]))
            above += np.int32(values[j] > threshold)
        count += above
        if top > most and not (most == _MINUS_ZERO and top == _ZERO):
            most, where = top, start
    return _turned(most).view(np.float32), where, count


@compiled(fastmath=_SUMS)
def feed(
    z,  # [R, v] fp32: columns start … start + v; or [0, 0]
    brief,  # [R, v] int16: the same as bits of bf16; or [0, 0]
    start,
    cut,  # bool: whether sums are only made at the temperature, of logits above the threshold
    column,  # [R] int64: targets; a column of another tile, or negative, is not here
    threshold,  # [R] fp32: what ranks count against
    inverse,  # [R] fp32: 1/T; or [0]
    top,  # [R] fp32: the largest logit, NOTHING before the first
    argmax,  # [R] int64: its lowest id
    target,  # [R] fp32: the target's logit, set by the tile that holds it
    count,  # [R] fp64: logits above the threshold, but for the target's
    sums,  # [2, R] fp32
    scaled,  # [3, R] fp32; or [3, 0]
):
    """Takes one more tile into the statistics of these rows, all of which are read and written."""
    wide = np.empty(brief.shape[1], np.float32)
    for r in range(len(column)):
        row = wide if len(brief) else z[r]
        bits = row.view(np.int32)
        if len(brief):
            for j in range(len(bits)):
                bits[j] = np.int32(brief[r, j]) << np.int32(16)
        m, where, above = _largest(row, bits, threshold[r])
        own = column[r] - start
        if 0 <= own < len(row):
            target[r] = row[own]
            above -= row[own] > threshold[r]
        count[r] += above
        old = top[r]
        new = old if m <= old else m
        if m > old:
            while row[where] != m:
                where += 1
            argmax[r] = start + where
        top[r], d = new, old - new
        if not cut:
            s, t = _sums(row, new)
            decay = math.exp(d)
            sums[1, r] = decay * (sums[1, r] + d * sums[0, r]) + t
            sums[0, r] = decay * sums[0, r] + s
        if len(inverse):
            if cut:
                s, t, q = _cut_sums(row, new, inverse[r], threshold[r])
            else:
                s, t, q = _scaled_sums(row, new, inverse[r])
            d = max(d * inverse[r], np.float32(-1e9))
            decay = math.exp(d)
            scaled[2, r] = decay * (scaled[2, r] + d * (2 * scaled[1, r] + d * scaled[0, r])) + q
            scaled[1, r] = decay * (scaled[1, r] + d * scaled[0, r]) + t
            scaled[0, r] = decay * scaled[0, r] + s


@compiled(fastmath=_SUMS)
def outside(z, temperature, inv, limit, clip, out):
    """Σ p over the tokens within reach, and over those with T* > T Σ p and Σ p (T* − T), of fp32
    rows; 0 where all is −inf.

    z [R, V] fp32, temperature [R] fp32, inv fp32: 1 / (−ln p_min), limit fp32: the highest
    temperature, to which T* is clipped, or whose tokens are within reach; out [3, R] fp32, written.
    """
    for r in range(len(z)):
        row, T = z[r], temperature[r]
        m, _, _ = _largest(row, row.view(np.int32), np.float32(0))
        total, reach, mass, width = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        if m == -np.inf:
            total = _ONE
        else:
            for j in range(len(row)):
                x = row[j] - m
                x = _LOWEST if x < _LOWEST else x
                e = _exp(x)
                total += e
                required = -x * inv
                if clip:
                    required = min(required, limit)
                else:
                    e = e if required <= limit else np.float32(0)
                reach += e
                e = e if required > T else np.float32(0)
                mass += e
                width += e * (required - T)
        out[0, r], out[1, r], out[2, r] = reach / total, mass / total, width / total
