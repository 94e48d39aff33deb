"""Gumbel noise that depends on (seed, position, stream, id) and on nothing else.

    r = philox4x32-10(key = seed, counter = (id // 4, position, stream, domain))[id % 4]
    u = (r + ½)·2⁻³², kept below 1          g = −log(−log1p(−u))

A large g comes from a small u, which fp32 holds to full relative precision: g reaches 22.9, not the
16.6 of a 24-bit uniform. Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011.
"""

import triton
import triton.language as tl

SAMPLE_DOMAIN = tl.constexpr(0)


@triton.jit
def exponential(b_u):
    """−log1p(−u) for u in (0, 1): below ¼ by 2·atanh(u/(2−u)), whose series has no cancellation."""
    b_s = b_u / (2.0 - b_u)
    b_q = b_s * b_s
    b_series = 2.0 * b_s * (1.0 + b_q * (1 / 3 + b_q * (1 / 5 + b_q * (1 / 7 + b_q * (1 / 9)))))
    return tl.where(b_u < 0.25, b_series, -tl.log(1.0 - b_u))


@triton.jit
def gumbel(seed, position, stream, o_g, shape: tl.constexpr, domain: tl.constexpr):
    """Gumbel noise of the token ids 4·o_g … 4·o_g + 3, in order: one Philox serves four.

    Args:
        seed (i64), position, stream (i64, of which 32 bits count): of the row, or one for each row
        as `[rows, 1]`.
        o_g: `[…, block / 4]` i32.
        shape: `[…, block]`, of the fp32 result.
    """
    zero = tl.zeros_like(o_g)
    r0, r1, r2, r3 = tl.philox(
        seed, o_g, zero + position.to(tl.int32), zero + stream.to(tl.int32), zero + domain
    )  # join puts its arguments last: [[r0, r1], [r2, r3]] reads 0, 1, 2, 3
    b_r = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), shape)
    return _gumbel_of_bits(b_r)


@triton.jit
def gumbel_of_ids(seed, position, stream, o_v, domain: tl.constexpr):
    """The same of any token ids o_v (i32), a Philox each."""
    zero = tl.zeros_like(o_v)
    r0, r1, r2, r3 = tl.philox(
        seed, o_v // 4, zero + position.to(tl.int32), zero + stream.to(tl.int32), zero + domain
    )
    b_r = tl.where(o_v % 2 == 0, tl.where(o_v % 4 == 0, r0, r2), tl.where(o_v % 4 == 1, r1, r3))
    return _gumbel_of_bits(b_r)


@triton.jit
def _gumbel_of_bits(b_r):
    b_u = (b_r.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    b_u = tl.minimum(b_u, 0.99999994)
    return -tl.log(exponential(b_u))
