"""What the splits of a row leave for its last kernel, and what that says before any second look.

A split knows logits z and scores s = z + T·g of its tokens, and of the row's cut τ only that it is
at least its own maximum + c. Its best token with z ≥ τ, as τ rises, walks up a staircase: the
tokens that no other beats in logit and in score. The first two steps are kept:

    winner     s₁: the highest score, the lowest id at ties; z₁ its logit
    runner-up  s₂: the same among tokens with z > z₁; z₂ its logit

    τ ≤ z₁        the winner is the best token ≥ τ, by definition
    z₁ < τ ≤ z₂   the runner-up is: tokens ≥ τ are some of those with z > z₁, and it is one of them
    z₂ < τ        no token ≥ τ has a score above s₂. The split is *open*, unless τ is above its
                  maximum, and must be looked at again if s₂ reaches the best score of the others

Tile by tile (`climb`) the winner stays exact. The runner-up does unless a new winner's logit
reaches z₂: of the tokens above it that came before, only the bound s₂ is known then, and is kept as
a runner-up with no logit (−inf), until a tile holds a better one.

floats [6, B, S] fp32   maximum m; score and logit of the winner, of the runner-up (−inf without
                        one); Σ e^{(z − m)/T} if asked
ints   [3, B, S] i32    ids of the two; 1 NaN seen, 2 +inf seen
"""

import triton
import triton.language as tl

from .logit_tiles import LOWEST
from .row_parameters import GREEDY_BELOW


@triton.jit
def best_of_rows(b_s, b_z, tile, block: tl.constexpr):
    """The highest score in each row of a tile, the first of them: score, id and logit."""
    b_top, b_at = tl.max(b_s, 1, return_indices=True)
    m_best = tl.arange(0, block)[None, :] == b_at[:, None]
    return b_top, tile * block + b_at, tl.max(tl.where(m_best, b_z, -float("inf")), 1)


@triton.jit
def climb(b_s, b_z, tile, b_max, s1, i1, z1, s2, i2, z2, block: tl.constexpr):
    """Winner and runner-up of each row, score, id and logit, after a tile of scores and logits;
    `b_max` is the maximum before it."""
    b_s1, b_i1, b_z1 = best_of_rows(b_s, b_z, tile, block)
    m_won = b_s1 > s1
    m_step = m_won & (z1 > b_z1)  # the old winner is a step above the new one
    s2, i2, z2 = tl.where(m_step, s1, s2), tl.where(m_step, i1, i2), tl.where(m_step, z1, z2)
    s1, i1, z1 = tl.where(m_won, b_s1, s1), tl.where(m_won, b_i1, i1), tl.where(m_won, b_z1, z1)
    s2 = tl.where(b_max > z1, s2, -float("inf"))
    z2 = tl.where(z2 > z1, z2, -float("inf"))
    b_above = tl.where(b_z > z1[:, None], b_s, -float("inf"))
    b_s2, b_i2, b_z2 = best_of_rows(b_above, b_z, tile, block)
    m_second = b_s2 > s2
    s2, i2 = tl.where(m_second, b_s2, s2), tl.where(m_second, b_i2, i2)
    return s1, i1, z1, s2, i2, tl.where(m_second, b_z2, z2)


@triton.jit
def best_candidate(float_ptr, int_ptr, row, S, c, block_s: tl.constexpr):
    """What a row's partials say before any second look.

    Returns its maximum and τ; score, id and logit of the best candidate with z ≥ τ; what tokens of
    open splits may score (−inf elsewhere), `[block_s]`; the union of the flags.
    """
    plane = tl.num_programs(0).to(tl.int64) * S
    o_s = tl.arange(0, block_s)
    m_s = o_s < S
    p = float_ptr + row * S + o_s
    b_max = tl.load(p, mask=m_s, other=-float("inf"))
    b_score = tl.load(p + plane, mask=m_s, other=-float("inf"))
    b_logit = tl.load(p + 2 * plane, mask=m_s, other=-float("inf"))
    b_second = tl.load(p + 3 * plane, mask=m_s, other=-float("inf"))
    b_higher = tl.load(p + 4 * plane, mask=m_s, other=-float("inf"))
    p = int_ptr + row * S + o_s
    b_id = tl.load(p, mask=m_s, other=0)
    b_id2 = tl.load(p + plane, mask=m_s, other=0)
    b_flag = tl.load(p + 2 * plane, mask=m_s, other=0)
    m = tl.max(b_max, 0)
    tau = tl.maximum(m, LOWEST) + c  # (−inf) + inf is NaN
    m_won = b_logit >= tau
    b_claim = tl.where(m_won, b_score, b_second)
    b_id = tl.where(m_won, b_id, b_id2)
    b_logit = tl.where(m_won, b_logit, b_higher)
    m_valid = (b_logit >= tau) & (b_claim > -float("inf"))
    score, at = tl.max(tl.where(m_valid, b_claim, -float("inf")), 0, return_indices=True)
    winner = tl.sum(tl.where(o_s == at, b_id, 0), 0)
    logit = tl.max(tl.where(o_s == at, b_logit, -float("inf")), 0)
    b_open = tl.where(m_valid | (b_max < tau) | (b_max == -float("inf")), -float("inf"), b_claim)
    flag = tl.max(b_flag & 1, 0) + tl.max(b_flag & 2, 0)
    return m, tau, score, winner, logit, b_open, flag


@triton.jit
def whole_logprob(float_ptr, row, S, m, T, logit, block_s: tl.constexpr):
    """ln softmax(z/T) of a logit over the whole row; 0 in greedy and empty rows."""
    o_s = tl.arange(0, block_s)
    p = float_ptr + row * S + o_s
    b_max = tl.load(p, mask=o_s < S, other=-float("inf"))
    b_mass = tl.load(p + 5 * tl.num_programs(0).to(tl.int64) * S, mask=o_s < S, other=0.0)
    divisor = tl.maximum(T, GREEDY_BELOW)
    mass = tl.sum(tl.where(b_max > -float("inf"), b_mass * tl.exp((b_max - m) / divisor), 0.0), 0)
    sampled = (m > -float("inf")) & (T > 0)
    return tl.where(sampled, logit - m, 0.0) / divisor - tl.log(tl.where(sampled, mass, 1.0))
