"""What the tiles of a row leave for its last kernel, and what that says before any second look.

A tile knows logits z and scores s = z + T·g of its tokens, and of the row's cut τ only a lower
bound. Its best token with z ≥ τ, as τ rises, walks up a staircase: the tokens that no other beats
in logit and in score. The first two steps are kept:

    winner     s₁: the highest score, the lowest id at ties; z₁ its logit
    runner-up  s₂: the same among tokens with z > z₁; z₂ its logit

    τ ≤ z₁        the winner is the best token ≥ τ, by definition
    z₁ < τ ≤ z₂   the runner-up is: tokens ≥ τ are among those with z > z₁, and it is one of them
    z₂ < τ        no token ≥ τ scores above s₂: the tile is *open* unless τ is above its maximum

An open tile must be looked at again if s₂ reaches the best score that the others have found.

floats [6, B, n] fp32   maximum m; score and logit of the winner, of the runner-up (where there is
                        none a score of −inf, which is looked at first, and some logit);
                        Σ e^{(z − m)/T} if asked
codes  [B, n] i32       columns of the two in their tile, 8 bits each; then 1 NaN seen, 2 +inf seen
"""

import triton
import triton.language as tl

from .logit_tiles import LOWEST
from .row_parameters import GREEDY_BELOW


@triton.jit
def best_of_rows(b_s, b_z, block: tl.constexpr):
    """The highest score in each row of a tile, the first of them: score, logit and column; of a
    row without one −inf, and logit and column of its first token."""
    b_top, b_at = tl.max(b_s, 1, return_indices=True)
    m_best = tl.arange(0, block)[None, :] == b_at[:, None]
    return b_top, tl.max(tl.where(m_best, b_z, -float("inf")), 1), b_at


@triton.jit
def best_candidate(float_ptr, code_ptr, row, n, c, block: tl.constexpr, block_n: tl.constexpr):
    """What a row's tiles say before any second look.

    Returns its maximum and τ; score, id and logit of the best candidate with z ≥ τ; the union of
    the flags.
    """
    plane = tl.num_programs(0).to(tl.int64) * n
    o_n = tl.arange(0, block_n)
    m_n = o_n < n
    p = float_ptr + row * n
    b_max = tl.load(p + o_n, mask=m_n, other=-float("inf"))
    b_score = tl.load(p + plane + o_n, mask=m_n, other=-float("inf"))
    b_logit = tl.load(p + 2 * plane + o_n, mask=m_n, other=-float("inf"))
    b_second = tl.load(p + 3 * plane + o_n, mask=m_n, other=-float("inf"))
    b_higher = tl.load(p + 4 * plane + o_n, mask=m_n, other=-float("inf"))
    b_code = tl.load(code_ptr + row * n + o_n, mask=m_n, other=0)
    m = tl.max(b_max, 0)
    tau = tl.maximum(m, LOWEST) + c  # (−inf) + inf is NaN
    m_won = b_logit >= tau
    b_claim = tl.where(m_won, b_score, b_second)
    m_valid = (m_won | (b_higher >= tau)) & (b_claim > -float("inf"))
    score, tile = tl.max(tl.where(m_valid, b_claim, -float("inf")), 0, return_indices=True)
    logit, code = tl.load(p + 2 * plane + tile), tl.load(code_ptr + row * n + tile)
    column = tl.where(logit >= tau, code & 255, (code >> 8) & 255)
    logit = tl.where(logit >= tau, logit, tl.load(p + 4 * plane + tile))
    flag = tl.max((b_code >> 16) & 1, 0) + tl.max((b_code >> 16) & 2, 0)
    return m, tau, score, tile * block + column, logit, flag


@triton.jit
def next_open(float_ptr, row, n, tau, claim, tile, block_n: tl.constexpr):
    """The open tile that comes after this one in falling order of what its tokens may score, and
    that score, −inf if there is none.

    Read again each time: it is rare, and the product needs the registers.
    """
    plane = tl.num_programs(0).to(tl.int64) * n
    o_n = tl.arange(0, block_n)
    m_n = o_n < n
    p = float_ptr + row * n + o_n
    b_max = tl.load(p, mask=m_n, other=-float("inf"))
    b_logit = tl.load(p + 2 * plane, mask=m_n, other=-float("inf"))
    b_second = tl.load(p + 3 * plane, mask=m_n, other=-float("inf"))
    b_higher = tl.load(p + 4 * plane, mask=m_n, other=-float("inf"))
    m_open = (b_logit < tau) & (b_higher < tau) & (b_max >= tau)
    m_after = (b_second < claim) | ((b_second == claim) & (o_n > tile))
    return tl.max(tl.where(m_open & m_after, b_second, -float("inf")), 0, return_indices=True)


@triton.jit
def whole_logprob(float_ptr, row, n, m, T, logit, block_n: tl.constexpr):
    """ln softmax(z/T) of a logit over the whole row; 0 in greedy and empty rows."""
    o_n = tl.arange(0, block_n)
    p = float_ptr + row * n + o_n
    b_max = tl.load(p, mask=o_n < n, other=-float("inf"))
    b_mass = tl.load(p + 5 * tl.num_programs(0).to(tl.int64) * n, mask=o_n < n, other=0.0)
    divisor = tl.maximum(T, GREEDY_BELOW)
    mass = tl.sum(tl.where(b_max > -float("inf"), b_mass * tl.exp((b_max - m) / divisor), 0.0), 0)
    sampled = (m > -float("inf")) & (T > 0)
    return tl.where(sampled, logit - m, 0.0) / divisor - tl.log(tl.where(sampled, mass, 1.0))
