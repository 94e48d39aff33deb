"""Philox4x32-10, the Gumbel noise made from it, and the best token of the tiles that can hold it: loops for one CPU core.

The integers are those of `kernels/philox.py`.
"""

import math

import numpy as np

from .compiled import compiled, elementwise

_M0, _M2, _W0, _W1 = (np.uint64(x) for x in (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_TINY, _HALF_STEP, _BELOW_ONE = np.float32(2.0**-32), np.float32(0.5), np.float32(1 - 2.0**-24)
_LN2 = np.float32(0.69315)  # rounded up
_BLOCK = 64  # logits compared with τ at once
GREEDY_BELOW = np.float32(1e-3)
LOWEST = np.finfo(np.float32).min  # `z ≥ max(τ, lowest)` also says that z is not −inf


@compiled()
def philox4x32(key, c0, c1, c2, c3):
    """Ten rounds of Philox4x32: four uint64 below 2³². The key has 64 bits; of each counter word 32 count."""
    k0, k1 = np.uint64(key) & _LOW, np.uint64(key) >> _HALF
    c0, c1, c2, c3 = np.uint64(c0) & _LOW, np.uint64(c1) & _LOW, np.uint64(c2) & _LOW, np.uint64(c3) & _LOW
    for _ in range(10):
        p0, p2 = _M0 * c0, _M2 * c2
        c0, c1, c2, c3 = (p2 >> _HALF) ^ c1 ^ k0, p2 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@elementwise()
def uniform_bits(seed, position, stream, i, domain):
    """The 32-bit integer of a token id, as uint64; all arguments int64 and broadcast together. The sampler's domain is 0."""
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
def cut(top, temperature, min_p, T, tau):
    """Writes T, 0 in greedy rows, and τ = top + T·ln min_p of each row; all `[B]` fp32."""
    for b in range(len(top)):
        T[b] = temperature[b] if temperature[b] >= GREEDY_BELOW else np.float32(0)
        tau[b] = top[b] + T[b] * np.float32(math.log(min_p[b])) if T[b] > 0 else top[b]


@compiled()
def draw(
    z,  # [B, V] fp32; or the tiles alone, [n, width]
    tile,  # [n] int64, ascending: row · tiles + tile of the row
    tiles,  # in a row
    width,  # of a tile
    V,
    first,  # id of column 0
    top,  # [B] fp32: the row's maximum
    tau,  # [B] fp32: tokens below do not take part
    T,  # [B] fp32, 0 in greedy rows
    seed,  # [B] int64
    position,  # [B] int64
    stream,  # [B] int64
    token,  # [B] int64, written: where the best score is
    best,  # [2, B] fp32, written over −inf: the best z + T·g, and its z
    kept,  # [B] int32, added to: tokens ≥ τ
    mass,  # [B] fp64, added to: Σ e^{(z − top)/T} of these; or [0] if not wanted
):
    """Gumbel-max over the tokens ≥ τ of some tiles, whose values are finite or −inf.

    A score is looked at only if it can be the best: g ≤ −ln u ≤ −⌊log₂ u⌋ ln 2, which needs u's exponent and no logarithm.
    """
    alone = z.shape[1] == width and tiles > 1
    for n in range(len(tile)):
        b, start = tile[n] // tiles, tile[n] % tiles * width
        lowest, heat = max(tau[b], LOWEST), T[b]
        own = z[n] if alone else z[b]
        at = 0 if alone else start
        for block in range(0, min(width, V - start), _BLOCK):
            values = own[at + block : at + min(block + _BLOCK, width, V - start)]
            hits = 0
            for j in range(len(values)):
                hits += values[j] >= lowest
            if hits == 0:
                continue
            kept[b] += hits
            group = np.int64(-1)
            for j in range(len(values)):
                logit = values[j]
                if not logit >= lowest:
                    continue
                i = first + start + block + j
                score = logit
                if heat > 0:
                    if len(mass):
                        mass[b] += math.exp((logit - top[b]) / heat)
                    if i >> 2 != group:
                        group = i >> 2
                        r0, r1, r2, r3 = philox4x32(seed[b], group, position[b], stream[b], 0)
                    u = uniform_of(r0 if i & 3 == 0 else r1 if i & 3 == 1 else r2 if i & 3 == 2 else r3)
                    if logit + heat * (np.float32(-exponent_of(u)) * _LN2) < best[0, b]:
                        continue
                    score = logit + heat * gumbel_of(u)
                if score > best[0, b]:
                    best[0, b], best[1, b], token[b] = score, logit, i
