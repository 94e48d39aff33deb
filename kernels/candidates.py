"""What the splits of a row leave for its last kernel, and what that says before any second look.

floats [4, B, S] fp32   maximum m, score z + T·g and logit z of the split's candidate (−inf without
                        one), Σ e^{(z − m)/T} if asked
ints   [2, B, S] i32    id of the candidate; 1 NaN seen, 2 +inf seen
"""

import triton
import triton.language as tl

from .logit_tiles import LOWEST
from .row_parameters import GREEDY_BELOW


@triton.jit
def best_candidate(float_ptr, int_ptr, row, S, c, block_s: tl.constexpr):
    """What a row's partials say before any second look.

    Returns its maximum and τ; score, id and logit of the best candidate with z ≥ τ; the scores of
    splits that reach τ but whose candidate does not (−inf elsewhere), `[block_s]`; the union of
    the flags.
    """
    plane = tl.num_programs(0).to(tl.int64) * S
    o_s = tl.arange(0, block_s)
    m_s = o_s < S
    p = float_ptr + row * S + o_s
    b_max = tl.load(p, mask=m_s, other=-float("inf"))
    b_score = tl.load(p + plane, mask=m_s, other=-float("inf"))
    b_logit = tl.load(p + 2 * plane, mask=m_s, other=-float("inf"))
    b_id = tl.load(int_ptr + row * S + o_s, mask=m_s, other=0)
    b_flag = tl.load(int_ptr + plane + row * S + o_s, mask=m_s, other=0)
    m = tl.max(b_max, 0)
    tau = tl.maximum(m, LOWEST) + c  # (−inf) + inf is NaN
    b_valid = (b_logit >= tau) & (b_score > -float("inf")) & (b_score < float("inf"))
    score, at = tl.max(tl.where(b_valid, b_score, -float("inf")), 0, return_indices=True)
    winner = tl.sum(tl.where(o_s == at, b_id, 0), 0)
    logit = tl.max(tl.where(o_s == at, b_logit, -float("inf")), 0)
    b_open = tl.where(b_valid | (b_max < tau) | (b_max == -float("inf")), -float("inf"), b_score)
    flag = tl.max(b_flag & 1, 0) + tl.max(b_flag & 2, 0)
    return m, tau, score, winner, logit, b_open, flag


@triton.jit
def whole_logprob(float_ptr, row, S, m, T, logit, block_s: tl.constexpr):
    """ln softmax(z/T) of a logit over the whole row; 0 in greedy and empty rows."""
    o_s = tl.arange(0, block_s)
    p = float_ptr + row * S + o_s
    b_max = tl.load(p, mask=o_s < S, other=-float("inf"))
    b_mass = tl.load(p + 3 * tl.num_programs(0).to(tl.int64) * S, mask=o_s < S, other=0.0)
    divisor = tl.maximum(T, GREEDY_BELOW)
    mass = tl.sum(tl.where(b_max > -float("inf"), b_mass * tl.exp((b_max - m) / divisor), 0.0), 0)
    sampled = (m > -float("inf")) & (T > 0)
    return tl.where(sampled, logit - m, 0.0) / divisor - tl.log(tl.where(sampled, mass, 1.0))
