"""Philox4x32-10, the Gumbel noise made from it, and the rows that are sampled with it: loops for
one CPU core.

The integers are those of `kernels/philox.py`. As a kernel does, `sample_rows` takes addresses of
tensors: after a model's step, when a call finds its code and objects in no cache, making arrays for
it and looking at them takes longer than reading a row of logits.
"""

import math

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from .jit import compiled, elementwise

_M0, _M2, _W0, _W1 = (np.uint64(x) for x in (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_TINY, _HALF_STEP, _BELOW_ONE = np.float32(2.0**-32), np.float32(0.5), np.float32(1 - 2.0**-24)
_LN2 = np.float32(0.69315)  # rounded up
_LEAST, _MOST, _MINUS_INFINITY = np.int32(-(2**31)), np.int32(2**31 - 1), np.uint32(0xFF800000)
_BLOCK = 64  # logits compared with τ at once
_STREAMS = 2  # places of a row that are read by turns; four were slower on the CPU of the records
GREEDY_BELOW = np.float32(1e-3)
HIGHEST_TEMPERATURE = np.float32(1e29)  # z + T·g of a finite z stays finite
BROKEN = -1  # status of a row that holds NaN or +inf
LOWEST = np.finfo(np.float32).min  # `z ≥ max(τ, lowest)` also says that z is not −inf


@compiled()
def philox4x32(key, c0, c1, c2, c3):
    """Ten rounds of Philox4x32: four uint64 below 2³².

    The key has 64 bits; of each counter word 32 count.
    """
    k0, k1 = np.uint64(key) & _LOW, np.uint64(key) >> _HALF
    c0, c1 = np.uint64(c0) & _LOW, np.uint64(c1) & _LOW
    c2, c3 = np.uint64(c2) & _LOW, np.uint64(c3) & _LOW
    for _ in range(10):
        p0, p2 = _M0 * c0, _M2 * c2
        c0, c1, c2, c3 = (p2 >> _HALF) ^ c1 ^ k0, p2 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@elementwise()
def uniform_bits(seed, position, stream, i, domain):
    """The 32-bit integer of a token id, as uint64; all arguments int64 and broadcast together. The
    sampler's domain is 0."""
    r0, r1, r2, r3 = philox4x32(seed, i >> 2, position, stream, domain)
    return r0 if i & 3 == 0 else r1 if i & 3 == 1 else r2 if i & 3 == 2 else r3


@compiled()
def uniform_of(r):
    """u = (r + ½)·2⁻³² in fp32, kept below 1."""
    return min((np.float32(r) + _HALF_STEP) * _TINY, _BELOW_ONE)


@compiled()
def gumbel_of(u):
    """−log(−log1p(−u)) in fp32."""
    return -np.float32(math.log(-math.log1p(-u)))


@compiled()
def exponent_of(u):
    """⌊log₂ u⌋, from the bits of a normal fp32 number."""
    return (np.float32(u).view(np.int32) >> np.int32(23)) - np.int32(127)


@compiled()
def largest(words):
    """The maximum of fp32 numbers, from their bits as int32; NaN where one is.

    Integers have the order of the floats, or the opposite one among negative floats: the maximum is
    the largest integer, or the smallest if all are negative. A positive NaN is larger than any
    float; a negative one is above −inf when both are read without a sign.
    """
    high, low, beyond = _LEAST, _MOST, np.uint32(0)
    for j in range(len(words)):
        high, low = max(high, words[j]), min(low, words[j])
        beyond = max(beyond, np.uint32(words[j]))
    if beyond > _MINUS_INFINITY:
        return np.float32(np.nan)
    return np.int32(high if high >= 0 else low).view(np.float32)


@compiled()
def _cut(m, temperature, min_p, known):
    """Of a row whose largest logit is m, or a known one: its maximum, T, 0 if greedy, and τ, which
    is +inf, and T 0, where one of them is NaN or out of range."""
    top = m
    if not known <= m:
        top = known if known < np.inf else np.float32(np.inf)
    usable = 0 <= temperature <= HIGHEST_TEMPERATURE and 0 <= min_p <= 1
    if not (usable and top < np.inf):
        return top, np.float32(0), np.float32(np.inf)
    if temperature < GREEDY_BELOW:
        return top, np.float32(0), top
    return top, temperature, top + temperature * np.float32(math.log(min_p))


@compiled()
def _best_of_tile(values, first_id, lowest, T, top, noise, measure, found):
    """The best of a tile's tokens ≥ `lowest` and of what was found before.

    `found` and the result: (score, logit, token, kept, mass).

    A score is looked at only if it can be the best: g ≤ −ln u ≤ −⌊log₂ u⌋ ln 2, which needs u's
    exponent and no logarithm.
    """
    (seed, position, stream), (best, z, token, kept, mass) = noise, found
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        hits = 0
        for j in range(len(block)):
            hits += block[j] >= lowest
        if hits == 0:
            continue
        kept += hits
        group = np.int64(-1)
        for j in range(len(block)):
            logit = block[j]
            if not logit >= lowest:
                continue
            i = first_id + start + j
            score = logit
            if T > 0:
                if measure:
                    mass += math.exp((logit - top) / T)
                if i >> 2 != group:
                    group = i >> 2
                    r0, r1, r2, r3 = philox4x32(seed, group, position, stream, 0)
                u = uniform_of(r0 if i & 3 == 0 else r1 if i & 3 == 1 else r2 if i & 3 == 2 else r3)
                if logit + T * (np.float32(-exponent_of(u)) * _LN2) < best:
                    continue
                score = logit + T * gumbel_of(u)
            if score > best:
                best, z, token = score, logit, i
    return best, z, token, kept, mass


@intrinsic
def _pointer(typing, address):
    """An address as a pointer."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


@compiled()
def _float(address, number, b):
    """Row b's value of a [B] fp32 tensor, or, of the address 0, the number that all rows share."""
    return numba.carray(_pointer(address), b + 1, np.float32)[b] if address else np.float32(number)


@compiled()
def _integer(address, number, b):
    """The same of int64."""
    return numba.carray(_pointer(address), b + 1, np.int64)[b] if address else np.int64(number)


@compiled()
def _tile_maxima(words, width, tops):
    """Writes the maxima of a row's tiles, from its bits."""
    turns = -(-len(tops) // _STREAMS)
    for turn in range(turns):
        for t in range(turn, len(tops), turns):
            tops[t] = largest(words[t * width : min((t + 1) * width, len(words))])


@compiled()
def sample_rows(
    first,  # row of the B that this call begins with
    last,  # row before which it ends
    z,  # fp32 logits
    stride,  # of a row
    B,
    V,
    width,  # of a tile
    first_id,  # id of column 0
    maxima,  # [B, ⌈V/width⌉] fp32 of the rows' tiles, NaN or +inf where one is; or 0: taken here
    known,  # [B] fp32 lower bounds of the rows' maxima, or 0
    floor,  # [B] fp32 lower bounds of τ, or 0
    temperature_ptr,  # [B] fp32, or 0, as the next four
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] int64
    position_ptr,  # [B] int64
    stream_ptr,  # [B] int64
    temperature,
    min_p,
    seed,
    position,
    stream,
    stream_step,  # stream = stream + row · stream_step
    lowest_floor,  # of all rows
    measure,  # whether Σ e^{(z − top)/T} is wanted
    token,  # [B] int64, written: where the best score is
    status,  # [B] int32, written: 4 and 8 of `SampleOutput`, or BROKEN
    # [7, B] fp64, written: maximum, T (0 if greedy), τ of Min-P, the best z + T·g, its z, tokens of
    # the kept set, Σ e^{(z − top)/T} of these; or 0
    found,
):
    """Gumbel-max over the tokens ≥ τ of each row: the maxima of its tiles, the cut, and the tiles
    that reach it, while the row is in the caches.

    Returns whether no row has NaN or +inf; of one that has only the status is written.
    """
    well, nothing, tiles = True, np.float32(-np.inf), -(-V // width)
    tokens = numba.carray(_pointer(token), B, np.int64)
    statuses = numba.carray(_pointer(status), B, np.int32)
    of_rows = numba.carray(_pointer(found), (7, B), np.float64)
    tops = np.empty(tiles, np.float32)
    for b in range(first, last):
        row = numba.carray(_pointer(z + 4 * b * stride), V, np.float32)
        if maxima:
            tops = numba.carray(_pointer(maxima + 4 * b * tiles), tiles, np.float32)
        else:
            _tile_maxima(row.view(np.int32), width, tops)
        m = largest(tops.view(np.int32))
        if not m < np.inf:
            statuses[b], well = BROKEN, False
            continue
        top, T, tau = _cut(
            m, _float(temperature_ptr, temperature, b), _float(min_p_ptr, min_p, b),
            _float(known, -np.inf, b),
        )  # fmt: skip
        lowest = max(max(tau, _float(floor, lowest_floor, b)), LOWEST)
        if lowest == np.inf:
            T = np.float32(0)
        statuses[b] = (4 if top == -np.inf else 0) + (8 if lowest == np.inf else 0)
        noise = (
            _integer(seed_ptr, seed, b), _integer(position_ptr, position, b),
            _integer(stream_ptr, stream + b * stream_step, b),
        )  # fmt: skip
        best = nothing, nothing, np.int64(0), np.int64(0), 0.0
        for t in range(tiles):
            if tops[t] >= lowest:
                start = t * width
                values = row[start : min(start + width, V)]
                best = _best_of_tile(values, first_id + start, lowest, T, top, noise, measure, best)
        tokens[b] = best[2]
        if found:
            of_rows[0, b], of_rows[1, b], of_rows[2, b] = top, T, tau
            of_rows[3, b], of_rows[4, b], _, of_rows[5, b], of_rows[6, b] = best
    return well
