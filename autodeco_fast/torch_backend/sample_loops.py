"""Philox4x32-10, the Gumbel noise made from it, and the best token of the tiles that can hold it:
loops for one CPU core.

The integers are those of `kernels/philox.py`.
"""

import math

import numpy as np

from .jit import compiled, elementwise

_M0, _M2, _W0, _W1 = (np.uint64(x) for x in (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_TINY, _HALF_STEP, _BELOW_ONE = np.float32(2.0**-32), np.float32(0.5), np.float32(1 - 2.0**-24)
_LN2 = np.float32(0.69315)  # rounded up
_MAGNITUDE, _SIGN, _INFINITY = np.int32(0x7FFFFFFF), np.int32(31), np.int32(0x7F800000)
_BLOCK = 64  # logits compared with τ at once
GREEDY_BELOW = np.float32(1e-3)
HIGHEST_TEMPERATURE = np.float32(1e29)  # z + T·g of a finite z stays finite
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
def maxima_of(bits, width, out):
    """Writes the maxima of a row's tiles, from fp32 as int32; returns whether a NaN is there.

    Integers have the order of the floats when bits of negative ones are turned over, but for the
    sign. Only a NaN's magnitude is above infinity's.
    """
    magnitude = np.int32(0)
    for t in range(len(out)):
        words = bits[t * width : min((t + 1) * width, len(bits))]
        top = np.int32(-(2**31))
        for j in range(len(words)):
            top = max(top, np.int32(words[j] ^ ((words[j] >> _SIGN) & _MAGNITUDE)))
            magnitude = max(magnitude, np.int32(words[j] & _MAGNITUDE))
        out[t] = np.int32(top ^ ((top >> _SIGN) & _MAGNITUDE)).view(np.float32)
    return magnitude > _INFINITY


@compiled()
def cuts(
    maxima,  # [B, tiles] fp32
    known,  # [B] fp32 lower bounds of the rows' maxima; or [0]
    temperature,  # [B] fp32
    min_p,  # [B] fp32
    top,  # [B] fp32, written: maximum
    T,  # [B] fp32, written: 0 in greedy rows
    # [B] fp32, written: top + T·ln min_p; +inf, which no token reaches, where one of them is NaN or
    # out of range
    tau,
    status,  # [B] int32, written: 8 there, 0 elsewhere
):
    """Returns whether no row has NaN or +inf; a row that has a NaN gets it as its maximum."""
    well, m = True, np.empty(1, np.float32)
    for b in range(len(maxima)):
        if maxima_of(maxima[b].view(np.int32), maxima.shape[1], m):
            m[0] = np.nan
        well = well and m[0] < np.inf
        top[b] = m[0]
        if len(known) and not known[b] <= m[0]:
            top[b] = known[b] if known[b] < np.inf else np.inf
        T[b], tau[b], status[b] = np.float32(0), top[b], 0
        usable = 0 <= temperature[b] <= HIGHEST_TEMPERATURE and 0 <= min_p[b] <= 1
        if not (usable and top[b] != np.inf):
            tau[b], status[b] = np.inf, 8
        elif temperature[b] >= GREEDY_BELOW:
            T[b] = temperature[b]
            tau[b] = top[b] + T[b] * np.float32(math.log(min_p[b]))
    return well


@compiled()
def candidate_tiles(maxima, tau):
    """The tiles that reach τ, ascending: row · tiles + tile of the row; of `maxima [B, tiles]`."""
    n, tiles = 0, maxima.shape[1]
    for b in range(len(maxima)):
        lowest = max(tau[b], LOWEST)
        for t in range(tiles):
            n += maxima[b, t] >= lowest
    found = np.empty(n, np.int64)
    n = 0
    for b in range(len(maxima)):
        lowest = max(tau[b], LOWEST)
        for t in range(tiles):
            if maxima[b, t] >= lowest:
                found[n] = b * tiles + t
                n += 1
    return found


@compiled()
def _best_of_tile(values, first_id, tau, T, top, seed, position, stream, measure, found):
    """The best of a tile's tokens ≥ τ and of what was found before.

    `found` and the result: (score, logit, token, kept, mass).

    A score is looked at only if it can be the best: g ≤ −ln u ≤ −⌊log₂ u⌋ ln 2, which needs u's
    exponent and no logarithm.
    """
    best, z, token, kept, mass = found
    lowest = max(tau, LOWEST)
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


@compiled()
def best_tokens(
    z,  # [B, V] fp32; or the tiles alone, [n, width]
    tile,  # [n] int64, ascending: row · tiles + tile of the row
    tiles,  # in a row
    width,  # of a tile
    V,
    first_id,  # id of column 0
    top,  # [B] fp32: the row's maximum
    tau,  # [B] fp32: tokens below do not take part
    T,  # [B] fp32, 0 in greedy rows
    noise,  # [3, B] int64: seed, position, stream
    measure,  # whether Σ e^{(z − top)/T} is wanted
    token,  # [B] int64, written: where the best score is
    best,  # [2, B] fp32, written over −inf: the best z + T·g, and its z
    kept,  # [B] int64, added to: tokens ≥ τ
    mass,  # [B] fp64, added to: Σ e^{(z − top)/T} of these
):
    """Gumbel-max over the tokens ≥ τ of some tiles, whose values are finite or −inf."""
    alone = z.shape[1] == width and tiles > 1
    for n in range(len(tile)):
        b, start = tile[n] // tiles, tile[n] % tiles * width
        length = min(width, V - start)
        values = z[n][:length] if alone else z[b][start : start + length]
        found = best[0, b], best[1, b], token[b], kept[b], mass[b]
        found = _best_of_tile(
            values, first_id + start, tau[b], T[b], top[b], noise[0, b], noise[1, b], noise[2, b],
            measure, found,
        )  # fmt: skip
        best[0, b], best[1, b], token[b], kept[b], mass[b] = found
