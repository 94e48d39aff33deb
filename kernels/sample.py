"""One token a row by Gumbel-max over the Min-P set, with one read of the logits.

    token = argmax_i z_i + T·g_i   over   z_i ≥ τ,      τ = max(max z + c, floor),   c = T·ln p_min

z + T·g has the order of z/T + g and needs no division; T = 0 (greedy) makes τ the maximum and
silences the noise.

    1. _scan    grid [B, S]  a split of the row, tile by tile: running maximum m; where a tile
                             reaches m + c, noise for its tokens ≥ m + c, and the best of them, the
                             candidate (score, id, z), is kept. Elsewhere no noise is drawn.
    2. _finish  grid [B]     τ from all maxima; the best candidate with z ≥ τ leads; a split is read
                             again only if its own has z < τ and a score that reaches the leader's.
    3. _measure grid [B]     if asked: how many tokens are ≥ τ, and ln p of the token among them;
                             reads the splits that reach τ.

What a split compares contains the kept set of the whole row, so a candidate with z ≥ τ is the best
of the split's tokens in it, and a split whose candidate scores less than the leader cannot hold a
better one: the token is that of the masked Gumbel-max, exactly.

With top-k or top-p the scan draws nothing, kernels/top_k_top_p.py finds `floor`, and finish reads
the splits that reach τ. NaN and +inf are taken out of the row and reported: status 1 = NaN seen, 2
= +inf seen, 4 = nothing finite or allowed (token 0). Where T, p_min, top-k or top-p is NaN or out
of range τ is +inf, which keeps nothing: status 8, token 0.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.sampling import (
    CANDIDATE,
    FULL_LOGPROB,
    KEPT,
    LOGPROB,
    Sampled,
    SamplingParameters,
)  # fmt: skip

from .candidates import best_candidate, whole_logprob
from .device import on_its_device
from .logit_tiles import LOWEST, TILE, finite, load_tile, splits_of
from .philox import SAMPLE_DOMAIN, gumbel
from .row_parameters import (
    GREEDY_BELOW,
    NUMBERS,
    TENSORS,
    row_parameters,
    row_value,
    stream_and_step,
    temperature_and_cut,
    tensors_and_numbers,
)  # fmt: skip
from .top_k_top_p import top_k_top_p


@triton.jit
def _best_of_tile(b_z, tile, first_id, tau, T, seed, position, stream, block: tl.constexpr):
    """Score, id and logit of a tile's best token with z ≥ τ, −inf without one.

    Ties go to the lowest id.
    """
    o_g = first_id // 4 + tile * (block // 4) + tl.arange(0, block // 4)
    b_g = gumbel(seed, position, stream, o_g, [block], SAMPLE_DOMAIN)
    b_score = tl.where((b_z >= tau) & (b_z > -float("inf")), b_z + T * b_g, -float("inf"))
    score, at = tl.max(b_score, 0, return_indices=True)
    logit = tl.max(tl.where(tl.arange(0, block) == at, b_z, -float("inf")), 0)
    return score, first_id + tile * block + at, logit


_UNSPECIALIZED = ["first_id", "S", "depth", *NUMBERS]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _scan(
    z_ptr,  # [B, V] any float, row stride `stride`
    allowed_ptr,  # [B, words] i32 bits, or None
    temperature_ptr,  # [B] fp32 or None, as the next four
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] i64
    position_ptr,  # [B] i64
    stream_ptr,  # [B] i64
    known_ptr,  # [B] fp32: a lower bound of the row's maximum, or None
    float_ptr,  # [4, B, S] fp32, written: maximum m; candidate's score and logit; Σ e^{(z − m)/T}
    int_ptr,  # [2, B, S] i32, written: candidate's id; 1 NaN, 2 +inf
    V,
    stride,
    words,
    S,
    depth,  # tiles a split
    first_id,  # id of column 0, a multiple of 4
    temperature,
    min_p,
    seed,
    position,
    stream,
    stream_step,  # stream = stream + row·stream_step
    block: tl.constexpr,
    with_noise: tl.constexpr,
    whole_mass: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    m = -float("inf")
    if known_ptr is not None:
        m = tl.load(known_ptr + row)
        # NaN is as wrong as +inf: nothing reaches it.
        m = tl.where(m < float("inf"), m, float("inf"))
    score = -float("inf")
    logit = -float("inf")
    mass = 0.0
    winner = 0
    flag = 0
    for tile in range(split * depth, tl.minimum((split + 1) * depth, tl.cdiv(V, block))):
        b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
        # +inf also where there is a NaN: one comparison finds both.
        top = tl.max(tl.where(b_z < float("inf"), b_z, float("inf")), 0)
        if top == float("inf"):
            flag |= tl.max((b_z != b_z).to(tl.int32), 0)
            flag |= 2 * tl.max((b_z == float("inf")).to(tl.int32), 0)
            b_z = finite(b_z)
            top = tl.max(b_z, 0)
        new = tl.maximum(m, top)
        if whole_mass:
            divisor = tl.maximum(T, GREEDY_BELOW)
            here = tl.sum(tl.where(b_z > -float("inf"), tl.exp((b_z - new) / divisor), 0.0), 0)
            mass = tl.where(m > -float("inf"), mass * tl.exp((m - new) / divisor), 0.0) + here
        m = new
        if with_noise:
            if (top >= m + c) & (top > -float("inf")):
                s, i, z = _best_of_tile(
                    b_z, tile, first_id, m + c, T, row_seed, row_position, row_stream, block
                )
                if s > score:
                    score = s
                    winner = i
                    logit = z
    if not with_noise:
        score = float("inf")  # nothing is known of this split: finish reads it if it reaches τ
    plane = tl.num_programs(0).to(tl.int64) * S
    o = row * S + split
    tl.store(float_ptr + o, m)
    tl.store(float_ptr + plane + o, score)
    tl.store(float_ptr + 2 * plane + o, logit)
    if whole_mass:
        tl.store(float_ptr + 3 * plane + o, mass)
    tl.store(int_ptr + o, winner)
    tl.store(int_ptr + plane + o, flag)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _finish(
    z_ptr,  # [B, V]
    allowed_ptr,  # [B, words] i32 bits, or None
    floor_ptr,  # [B] fp32 or None
    temperature_ptr,  # [B] fp32 or None, as the next four
    min_p_ptr,
    seed_ptr,
    position_ptr,
    stream_ptr,
    float_ptr,  # [4, B, S] fp32
    int_ptr,  # [2, B, S] i32
    token_ptr,  # [B] i64, written
    status_ptr,  # [B] i32, written
    full_logprob_ptr,  # [B] fp32, written, or None
    candidate_ptr,  # [3, B] fp32, written: maximum, score and logit of the winner; or None
    V,
    stride,
    words,
    S,
    depth,
    first_id,
    temperature,
    min_p,
    seed,
    position,
    stream,
    stream_step,
    block: tl.constexpr,
    block_s: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    m, tau, score, winner, logit, b_open, flag = best_candidate(
        float_ptr, int_ptr, floor_ptr, row, S, c, block_s
    )
    claim, split = tl.max(b_open, 0, return_indices=True)
    tiles = tl.cdiv(V, block)
    while (claim >= score) & (claim > -float("inf")):
        for tile in range(split * depth, tl.minimum((split + 1) * depth, tiles)):
            b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
            b_z = finite(b_z)
            if tl.max(b_z, 0) >= tau:
                s, i, z = _best_of_tile(
                    b_z, tile, first_id, tau, T, row_seed, row_position, row_stream, block
                )
                if (s > score) | ((s == score) & (i < winner)):
                    score = s
                    winner = i
                    logit = z
        b_open = tl.where(tl.arange(0, block_s) == split, -float("inf"), b_open)
        claim, split = tl.max(b_open, 0, return_indices=True)
    alive = m > -float("inf")
    wrong = tau == float("inf")
    tl.store(token_ptr + row, tl.where(alive, winner, 0).to(tl.int64))
    tl.store(status_ptr + row, flag + tl.where(alive, 0, 4) + tl.where(wrong, 8, 0))
    if candidate_ptr is not None:
        B = tl.num_programs(0).to(tl.int64)
        tl.store(candidate_ptr + row, m)
        tl.store(candidate_ptr + B + row, score)
        tl.store(candidate_ptr + 2 * B + row, logit)
    if full_logprob_ptr is not None:
        T = tl.where(wrong, 0.0, T)
        tl.store(full_logprob_ptr + row, whole_logprob(float_ptr, row, S, m, T, logit, block_s))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _measure(
    z_ptr,  # [B, V]
    allowed_ptr,  # [B, words] i32 bits, or None
    floor_ptr,  # [B] fp32 or None
    temperature_ptr,  # [B] fp32 or None
    min_p_ptr,  # [B] fp32 or None
    m_ptr,  # [B, S] fp32: the splits' maxima
    token_ptr,  # [B] i64
    logprob_ptr,  # [B] fp32, written
    kept_ptr,  # [B] i32, written
    V,
    stride,
    words,
    S,
    depth,
    temperature,
    min_p,
    block: tl.constexpr,
    block_s: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    T, c = temperature_and_cut(
        row_value(temperature_ptr, temperature, row, tl.float32),
        row_value(min_p_ptr, min_p, row, tl.float32),
    )
    o_s = tl.arange(0, block_s)
    m = tl.max(tl.load(m_ptr + row * S + o_s, mask=o_s < S, other=-float("inf")), 0)
    tau = tl.maximum(m, LOWEST) + c
    if floor_ptr is not None:
        tau = tl.maximum(tau, tl.load(floor_ptr + row))
    alive = (m > -float("inf")) & (tau < float("inf"))
    sampled = alive & (T > 0)
    divisor = tl.maximum(T, GREEDY_BELOW)
    kept = 0
    mass = 0.0
    for split in range(0, S):
        if (tl.load(m_ptr + row * S + split) >= tau) & sampled:
            for tile in range(split * depth, tl.minimum((split + 1) * depth, tl.cdiv(V, block))):
                b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
                b_z = finite(b_z)
                b_in = (b_z >= tau) & (b_z > -float("inf"))
                kept += tl.sum(b_in.to(tl.int32), 0)
                mass += tl.sum(tl.where(b_in, tl.exp((b_z - m) / divisor), 0.0), 0)
    logit = tl.load(z_ptr + row * stride + tl.load(token_ptr + row)).to(tl.float32)
    logprob = tl.where(sampled, logit - m, 0.0) / divisor - tl.log(tl.where(sampled, mass, 1.0))
    tl.store(logprob_ptr + row, logprob)
    tl.store(kept_ptr + row, tl.where(sampled, kept, alive.to(tl.int32)))


@on_its_device
def sample(
    logits: torch.Tensor,
    parameters: SamplingParameters,
    *,
    allowed: torch.Tensor | None = None,
    first_id: int = 0,
    known_maximum: torch.Tensor | None = None,
    want: int = 0,
    tile: int = TILE,
    splits: int | None = None,
) -> Sampled:
    """Launches the two kernels; one more for top-k and top-p, one more for logprob and kept.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, unit stride along V.
        parameters: of the rows.
        allowed: `[B, ⌈V/32⌉]` int32: bit i % 32 of word i // 32 allows id i.
        first_id: of column 0, a multiple of 4, where the logits are a rank's of a vocabulary.
        known_maximum: `[B]` fp32 lower bounds of the whole rows' maxima, which τ heeds.
        want: a sum of LOGPROB, KEPT, FULL_LOGPROB and CANDIDATE.
        tile: logits a program reads at once; neither it nor `splits` changes the result.
        splits: of a row, at most; None chooses.
    """
    B, V = logits.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    token, status = new(B, dtype=torch.int64), new(B, dtype=torch.int32)
    measured = want & (LOGPROB | KEPT)  # one kernel makes both
    logprob, kept = (new(B), new(B, dtype=torch.int32)) if measured else (None, None)
    full_logprob = new(B) if want & FULL_LOGPROB else None
    candidate = new(3, B) if want & CANDIDATE else None
    out = Sampled(
        token, status, logprob if want & LOGPROB else None, kept if want & KEPT else None,
        full_logprob, candidate,
    )  # fmt: skip
    if B == 0:
        return out
    S, depth = splits_of(B, V, tile, splits)
    block_s = max(16, triton.next_power_of_2(S))
    floats, ints = new(4, B, S), new(2, B, S, dtype=torch.int32)
    p = parameters
    stream, stream_step = stream_and_step(p.stream)
    tensors, numbers = tensors_and_numbers(p.temperature, p.min_p, p.seed, p.position, stream)
    sizes = V, logits.stride(0), 0 if allowed is None else allowed.stride(0), S, depth
    scalars = *sizes, first_id, *numbers, stream_step, tile
    _scan[(B, S)](
        logits, allowed, *tensors, known_maximum, floats, ints, *scalars,
        with_noise=not p.truncated, whole_mass=full_logprob is not None,
    )  # fmt: skip
    floor = None
    if p.truncated:
        floor = top_k_top_p(logits, floats[0], p, allowed=allowed, depth=depth, tile=tile)
    _finish[(B,)](
        logits, allowed, floor, *tensors, floats, ints, token, status, full_logprob, candidate,
        *scalars, block_s,
    )  # fmt: skip
    if measured:
        _measure[(B,)](
            logits, allowed, floor, *tensors[:2], floats, token, logprob, kept,
            *sizes, *numbers[:2], tile, block_s,
        )  # fmt: skip
    return out


_DATA = {
    **{"z_ptr": "*bf16", "allowed_ptr": "*i32"},
    **TENSORS,
    **{"known_ptr": "*fp32", "float_ptr": "*fp32", "int_ptr": "*i32"},
    **dict.fromkeys(("V", "stride", "words", "S", "depth", "first_id"), "i32"),
    **NUMBERS,
}
_OUT = {"token_ptr": "*i64", "status_ptr": "*i32"}
_FLOOR, _FULL = {"floor_ptr": "*fp32"}, {"full_logprob_ptr": "*fp32", "candidate_ptr": "*fp32"}
_MEASURED = {
    **{"token_ptr": "*i64", "logprob_ptr": "*fp32", "kept_ptr": "*i32", "m_ptr": "*fp32"},
    **_FLOOR,
}
_NO_ROWS = {"allowed_ptr": None, **dict.fromkeys(TENSORS)}
_NOTHING = {"floor_ptr": None, "full_logprob_ptr": None, "candidate_ptr": None}


def _without(signature: dict, names: dict) -> dict:
    return {name: dtype for name, dtype in signature.items() if name not in names}


AOT = [  # the plain case, numbers for all rows and the token alone; then everything
    (_scan, _without(_DATA, {**_NO_ROWS, "known_ptr": None}),
     {**_NO_ROWS, "known_ptr": None, "block": TILE, "with_noise": True, "whole_mass": False}, 4, 3),
    (_scan, _DATA, {"block": TILE, "with_noise": True, "whole_mass": True}, 4, 3),
    (_finish, _without({**_DATA, **_OUT}, _NO_ROWS),
     {**_NO_ROWS, **_NOTHING, "block": TILE, "block_s": 256}, 4, 3),
    (_finish, {**_DATA, **_OUT, **_FLOOR, **_FULL}, {"block": TILE, "block_s": 256}, 4, 3),
    (_measure, {**_DATA, **_MEASURED}, {"block": TILE, "block_s": 256}, 4, 3),
]  # fmt: skip
