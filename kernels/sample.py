"""One token a row by Gumbel-max over the Min-P set, with one read of the logits from memory.

    token = argmax_i z_i + T·g_i   over   z_i ≥ τ,      τ = max(max z + c, floor),   c = T·ln p_min

z + T·g has the order of z/T + g and needs no division; T = 0 (greedy) makes τ the maximum and
silences the noise.

    1. _maxima  grid [B, S]  the maximum of every sub-tile of 256 logits, whatever T is, in
                             kernels/subtile_maxima.py; or it is given.
    2. _draw    grid [B, D]  τ from the row's maxima; sub-tiles that reach it, about ten of a row of
                             150,000 peaked logits, are dealt out and read again, out of the cache:
                             noise for their tokens ≥ τ, and the best of them is the program's
                             candidate. The last of a row's programs takes the best of all.

Noise is drawn where the kept set is and nowhere else, and nothing is looked at twice for it: the
token is that of the masked Gumbel-max, exactly. Without a cut every sub-tile reaches τ.

With top-k or top-p, kernels/top_k_top_p.py finds `floor` between the two. NaN and +inf are
taken out of the row and reported: a sub-tile that holds one has the maximum +inf, and a row with
such a maximum is looked at again. status: 1 = NaN seen, 2 = +inf seen, 4 = nothing finite or
allowed (token 0). Where T, p_min, top-k or top-p is NaN or out of range τ is +inf, which keeps
nothing: status 8, token 0.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.sampling import (
    CANDIDATE,
    FULL_LOGPROB,
    KEPT,
    LOGPROB,
    SUBTILE,
    Sampled,
    SamplingParameters,
    stream_and_step,
    tensors_and_numbers,
)

from .dependent_launch import TARGETS, dependent, options, waits
from .device import on_its_device
from .logit_tiles import LOWEST, TILE, finite, load_tile, may_hold, row_maximum
from .philox import SAMPLE_DOMAIN, gumbel
from .row_parameters import GREEDY_BELOW, NUMBERS, TENSORS, row_parameters
from .subtile_maxima import write_maxima
from .top_k_top_p import top_k_top_p

WARPS = 2  # a lane draws the noise of four tokens of a sub-tile, which one Philox serves
LANES = tl.constexpr(32 * WARPS)
DRAWING = 1024  # programs of `_draw`: eight a multiprocessor
ROW_PROGRAMS = 128  # at most, of these, for a row


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


@triton.jit
def _turns(b_in, block: tl.constexpr):
    """1, 2, … where true, 0 elsewhere: first those of a lane, one behind the other, then those of
    the next, so that sums stay in registers."""
    b_in = tl.reshape(b_in.to(tl.int32), [block // LANES, LANES])
    b_count = tl.sum(b_in, 0)
    b_before = tl.cumsum(b_count, 0) - b_count
    return tl.reshape((tl.cumsum(b_in, 0) + b_before[None, :]) * b_in, [block])


@triton.jit
def _is_last(done_ptr, row, programs):
    """Whether all programs of the row but this one have written what they had."""
    tl.debug_barrier()  # the release is one thread's: the others' stores come before it
    return tl.atomic_add(done_ptr + row, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def _best_candidate(float_ptr, int_ptr, plane, D, block_d: tl.constexpr):
    """Score, id and logit of the best of a row's candidates; ties go to the lowest id."""
    o_d = tl.arange(0, block_d)
    b_score = tl.load(float_ptr + o_d, mask=o_d < D, other=-float("inf"))
    b_id = tl.load(int_ptr + o_d, mask=o_d < D, other=2147483647)
    score = tl.max(b_score, 0)
    winner, at = tl.min(tl.where(b_score == score, b_id, 2147483647), 0, return_indices=True)
    return score, winner, tl.load(float_ptr + plane + at)


@triton.jit
def _whole_mass(sum_ptr, plane, n, m, divisor, block_n: tl.constexpr):
    """Σ e^{(z − m)/T} of a row, from those of its sub-tiles."""
    o_n = tl.arange(0, block_n)
    b_top = tl.load(sum_ptr + o_n, mask=o_n < n, other=-float("inf"))
    b_sum = tl.load(sum_ptr + plane + o_n, mask=o_n < n, other=0.0)
    b_off = tl.where(b_top > -float("inf"), b_top - m, -float("inf"))
    return tl.sum(b_sum * tl.exp(b_off / divisor), 0)


@triton.jit
def _answer(
    float_ptr, int_ptr, sum_ptr, token_ptr, status_ptr, logprob_ptr, kept_ptr, full_logprob_ptr,
    candidate_ptr, row, B, D, n, m, tau, T, flag, block_n: tl.constexpr, block_d: tl.constexpr,
):  # fmt: skip
    """Writes what is asked for of a row whose candidates are all there; arguments as in `_draw`."""
    score, winner, logit = _best_candidate(float_ptr, int_ptr, B * D, D, block_d)
    divisor = tl.maximum(T, GREEDY_BELOW)
    alive = m > -float("inf")
    wrong = tau == float("inf")
    tl.store(token_ptr + row, tl.where(alive, winner, 0).to(tl.int64))
    tl.store(status_ptr + row, flag + tl.where(alive, 0, 4) + tl.where(wrong, 8, 0))
    answered = alive & (tau < float("inf"))
    sampled = answered & (T > 0)
    above = tl.where(sampled, logit - m, 0.0) / divisor
    o_d = tl.arange(0, block_d)
    if logprob_ptr is not None:
        mass = tl.sum(tl.load(float_ptr + 2 * B * D + o_d, mask=o_d < D, other=0.0), 0)
        tl.store(logprob_ptr + row, above - tl.log(tl.where(sampled, mass, 1.0)))
    if kept_ptr is not None:
        b_kept = tl.load(int_ptr + B * D + o_d, mask=o_d < D, other=0)
        tl.store(kept_ptr + row, tl.where(sampled, tl.sum(b_kept, 0), answered.to(tl.int32)))
    if full_logprob_ptr is not None:
        whole = _whole_mass(sum_ptr + row * n, B * n, n, m, divisor, block_n)
        tl.store(full_logprob_ptr + row, above - tl.log(tl.where(sampled, whole, 1.0)))
    if candidate_ptr is not None:
        tl.store(candidate_ptr + row, m)
        tl.store(candidate_ptr + B + row, score)
        tl.store(candidate_ptr + 2 * B + row, logit)


@triton.jit(do_not_specialize=["n", "first_id", *NUMBERS])
def _draw(
    z_ptr,  # [B, V]
    allowed_ptr,  # [B, words] i32 bits, or None
    floor_ptr,  # [B] fp32 or None
    temperature_ptr,  # [B] fp32 or None, as the next four
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] i64
    position_ptr,  # [B] i64
    stream_ptr,  # [B] i64
    known_ptr,  # [B] fp32: a lower bound of the whole row's maximum, or None
    max_ptr,  # [B, n] fp32: maxima of sub-tiles; +inf or NaN where one holds NaN or +inf
    sum_ptr,  # [2, B, n] fp32: maxima of what is finite, Σ e^{(z − that)/T}; or None
    done_ptr,  # [B] i32, zero: how many of a row's programs have finished
    float_ptr,  # [3, B, D] fp32, written: candidates' score and logit; Σ e^{(z − m)/T} of z ≥ τ
    int_ptr,  # [2, B, D] i32, written: candidates' id; how many are ≥ τ
    token_ptr,  # [B] i64, written, as all that follow
    status_ptr,  # [B] i32
    logprob_ptr,  # [B] fp32 or None, as the next two
    kept_ptr,  # [B] i32
    full_logprob_ptr,  # [B] fp32
    candidate_ptr,  # [3, B] fp32: maximum, score and logit of the winner; or None
    V,
    stride,
    words,
    n,
    first_id,  # id of column 0, a multiple of 4
    temperature: tl.float32,
    min_p: tl.float32,
    seed: tl.int64,
    position: tl.int64,
    stream: tl.int64,
    stream_step,  # stream = stream + row·stream_step
    subtile: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
    dependent: tl.constexpr,
):
    waits(dependent)
    row = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    B, D = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    b_top, m, flag = row_maximum(
        z_ptr, allowed_ptr, max_ptr, row, V, stride, words, n, subtile, block_n
    )
    if known_ptr is not None:
        known = tl.load(known_ptr + row)
        # NaN is as wrong as +inf: nothing reaches it.
        m = tl.maximum(m, tl.where(known < float("inf"), known, float("inf")))
    tau = tl.maximum(m, LOWEST) + c  # (−inf) + inf is NaN
    if floor_ptr is not None:
        tau = tl.maximum(tau, tl.load(floor_ptr + row))
    divisor = tl.maximum(T, GREEDY_BELOW)
    measured: tl.constexpr = (logprob_ptr is not None) or (kept_ptr is not None)
    score = -float("inf")
    logit = -float("inf")
    winner = 0
    kept = 0
    mass = 0.0
    b_turn = _turns(may_hold(b_top, tau), block_n)
    for turn in range(program + 1, tl.max(b_turn, 0) + 1, D):
        tile = tl.max(tl.where(b_turn == turn, tl.arange(0, block_n), 0), 0)
        b_z = finite(load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, subtile))
        s, i, z = _best_of_tile(
            b_z, tile, first_id, tau, T, row_seed, row_position, row_stream, subtile
        )
        if (s > score) | ((s == score) & (i < winner)):  # turns are not in the order of ids
            score = s
            winner = i
            logit = z
        if measured:
            b_in = (b_z >= tau) & (b_z > -float("inf"))
            kept += tl.sum(b_in.to(tl.int32), 0)
            mass += tl.sum(tl.where(b_in, tl.exp((b_z - m) / divisor), 0.0), 0)
    float_ptr += row * D
    int_ptr += row * D
    tl.store(float_ptr + program, score)
    tl.store(float_ptr + B * D + program, logit)
    tl.store(int_ptr + program, winner)
    if measured:
        tl.store(float_ptr + 2 * B * D + program, mass)
        tl.store(int_ptr + B * D + program, kept)
    if _is_last(done_ptr, row, D):
        _answer(
            float_ptr, int_ptr, sum_ptr, token_ptr, status_ptr, logprob_ptr, kept_ptr,
            full_logprob_ptr, candidate_ptr, row, B, D, n, m, tau, T, flag, block_n, block_d,
        )  # fmt: skip


def programs_of(B: int, n: int) -> int:
    """Programs of a row that draw."""
    return min(n, ROW_PROGRAMS, max(1, DRAWING // B))


@on_its_device
def sample(
    logits: torch.Tensor,
    parameters: SamplingParameters,
    *,
    allowed: torch.Tensor | None = None,
    first_id: int = 0,
    known_maximum: torch.Tensor | None = None,
    maxima: torch.Tensor | None = None,
    want: int = 0,
    tile: int = TILE,
    splits: int | None = None,
) -> Sampled:
    """Launches the two kernels, one where maxima are given, and one more for top-k and top-p.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, unit stride along V.
        parameters: of the rows.
        allowed: `[B, ⌈V/32⌉]` int32: bit i % 32 of word i // 32 allows id i.
        first_id: of column 0, a multiple of 4, where the logits are a rank's of a vocabulary.
        known_maximum: `[B]` fp32 lower bounds of the whole rows' maxima, which τ heeds.
        maxima: `[B, ⌈V/256⌉]` fp32 of sub-tiles, contiguous: what `subtile_maxima` returns for
            these logits and `allowed`. The log-probability over the whole row has no use for them.
        want: a sum of LOGPROB, KEPT, FULL_LOGPROB and CANDIDATE.
        tile: logits a program reads at once; neither it nor `splits` changes the result.
        splits: of a row, at most, in the pass for the maxima; None chooses.
    """
    B, V = logits.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    out = Sampled(
        new(B, dtype=torch.int64),
        new(B, dtype=torch.int32),
        new(B) if want & LOGPROB else None,
        new(B, dtype=torch.int32) if want & KEPT else None,
        new(B) if want & FULL_LOGPROB else None,
        new(3, B) if want & CANDIDATE else None,
    )
    if B == 0:
        return out
    subtile = min(SUBTILE, tile)
    n = triton.cdiv(V, subtile)
    block_n = max(LANES.value, triton.next_power_of_2(n))
    D = programs_of(B, n)
    p = parameters
    sums = new(2, B, n) if want & FULL_LOGPROB else None
    if maxima is None or sums is not None:
        maxima, done = new(B, n), new(B, dtype=torch.int32)
        T = 0.0 if sums is None else p.temperature  # without sums: one variant for any T
        write_maxima(logits, allowed, maxima, sums, T, done=done, tile=tile, splits=splits)
    else:
        done = torch.zeros(B, dtype=torch.int32, device=logits.device)
    stream, stream_step = stream_and_step(p.stream)
    tensors, numbers = tensors_and_numbers(p.temperature, p.min_p, p.seed, p.position, stream)
    sizes = V, logits.stride(0), 0 if allowed is None else allowed.stride(0), n
    floor = None
    if p.truncated:
        floor = top_k_top_p(logits, maxima, p, allowed=allowed, tile=subtile)
    early = dependent(logits)
    _draw[(B, D)](
        logits, allowed, floor, *tensors, known_maximum, maxima, sums, done,
        new(3, B, D), new(2, B, D, dtype=torch.int32), *out,
        *sizes, first_id, *numbers, stream_step, subtile, block_n, ROW_PROGRAMS, early,
        num_warps=WARPS, **options(early),
    )  # fmt: skip
    return out


_SIGNATURE = {
    **{"z_ptr": "*bf16", "allowed_ptr": "*i32", "floor_ptr": "*fp32", **TENSORS},
    **{"known_ptr": "*fp32", "max_ptr": "*fp32", "sum_ptr": "*fp32", "done_ptr": "*i32"},
    **{"float_ptr": "*fp32", "int_ptr": "*i32", "token_ptr": "*i64", "status_ptr": "*i32"},
    **{"logprob_ptr": "*fp32", "kept_ptr": "*i32", "full_logprob_ptr": "*fp32"},
    **{"candidate_ptr": "*fp32", **dict.fromkeys(("V", "stride", "words", "n"), "i32")},
    **{"first_id": "i32", **NUMBERS},
}
_ASKED = ("sum_ptr", "logprob_ptr", "kept_ptr", "full_logprob_ptr", "candidate_ptr")
_PLAIN = ("allowed_ptr", "floor_ptr", *TENSORS, "known_ptr", *_ASKED)
_BLOCKS = {"subtile": SUBTILE, "block_n": 1024, "block_d": ROW_PROGRAMS, "dependent": False}
_ALONE = {name: dtype for name, dtype in _SIGNATURE.items() if name not in _PLAIN}
_FIXED = {**dict.fromkeys(_PLAIN), **_BLOCKS}
AOT = [  # numbers for all rows and the token alone; everything
    (_draw, _ALONE, _FIXED, WARPS, None),
    (_draw, _SIGNATURE, _BLOCKS, WARPS, None),
    (_draw, _ALONE, {**_FIXED, "dependent": True}, WARPS, None, *TARGETS),
]
