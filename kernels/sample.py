"""One token a row by Gumbel-max over the Min-P set, with one read of the logits from memory.

    token = argmax_i z_i + T·g_i   over   z_i ≥ τ,      τ = max(max z + c, floor),   c = T·ln p_min

z + T·g has the order of z/T + g and needs no division; T = 0 (greedy) makes τ the maximum and
silences the noise.

    1. _maxima  grid [B, S]  the maximum of every sub-tile of 256 logits, whatever T is, in
                             kernels/subtile_maxima.py; or it is given.
    2. _draw    grid [B, D]  τ from the row's maxima; sub-tiles that reach it, about ten of a row of
                             150,000 peaked logits, are read again, out of the cache: noise for
                             their tokens ≥ τ, and the best of them is the program's candidate.
    3. _finish  grid [B]     the best candidate of the row.

Noise is drawn where the kept set is and nowhere else, and nothing is looked at twice for it: the
token is that of the masked Gumbel-max, exactly. Without a cut every sub-tile reaches τ.

With top-k or top-p, kernels/top_k_top_p.py finds `floor` between the first two. NaN and +inf are
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

from .device import on_its_device
from .logit_tiles import LOWEST, TILE, finite, load_tile, next_reaching, reaching, row_maximum
from .philox import SAMPLE_DOMAIN, gumbel
from .row_parameters import (
    GREEDY_BELOW,
    NUMBERS,
    TENSORS,
    row_parameters,
    row_value,
    temperature_and_cut,
)
from .subtile_maxima import write_maxima
from .top_k_top_p import top_k_top_p

GROUP = 8  # sub-tiles whose maxima a program of `_draw` looks at together
# Programs of `_draw`, a warp each, while there are groups for them: sixteen a multiprocessor.
DRAWING = 2048
MOST_PARTS = 128  # of a row among them


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


@triton.jit(do_not_specialize=["n", "depth", "first_id", *NUMBERS])
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
    row_ptr,  # [2, B] fp32, written: maximum, τ
    status_ptr,  # [B] i32, written: 1 NaN, 2 +inf
    float_ptr,  # [3, B, D] fp32, written: the candidate's score and logit; Σ e^{(z − m)/T}, z ≥ τ
    int_ptr,  # [2, B, D] i32, written: the candidate's id; how many are ≥ τ
    V,
    stride,
    words,
    n,
    depth,  # sub-tiles a program, a multiple of `group`
    first_id,  # id of column 0, a multiple of 4
    temperature: tl.float32,
    min_p: tl.float32,
    seed: tl.int64,
    position: tl.int64,
    stream: tl.int64,
    stream_step,  # stream = stream + row·stream_step
    subtile: tl.constexpr,
    group: tl.constexpr,
    block_n: tl.constexpr,
    measured: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    _tops, m, flag = row_maximum(
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
    score = -float("inf")
    logit = -float("inf")
    winner = 0
    kept = 0
    mass = 0.0
    for first in range(part * depth, tl.minimum((part + 1) * depth, n), group):
        o_n, b_reach = reaching(max_ptr, row, first, n, tau, group)
        tile = next_reaching(o_n, b_reach, -1, n)
        while tile < n:
            b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, subtile)
            b_z = finite(b_z)
            s, i, z = _best_of_tile(
                b_z, tile, first_id, tau, T, row_seed, row_position, row_stream, subtile
            )
            if s > score:
                score = s
                winner = i
                logit = z
            if measured:
                b_in = (b_z >= tau) & (b_z > -float("inf"))
                kept += tl.sum(b_in.to(tl.int32), 0)
                mass += tl.sum(tl.where(b_in, tl.exp((b_z - m) / divisor), 0.0), 0)
            tile = next_reaching(o_n, b_reach, tile, n)
    B, D = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    o = row * D + part
    tl.store(float_ptr + o, score)
    tl.store(float_ptr + B * D + o, logit)
    tl.store(int_ptr + o, winner)
    if measured:
        tl.store(float_ptr + 2 * B * D + o, mass)
        tl.store(int_ptr + B * D + o, kept)
    if part == 0:
        tl.store(row_ptr + row, m)
        tl.store(row_ptr + B + row, tau)
        tl.store(status_ptr + row, flag)


@triton.jit(do_not_specialize=["n", "D", "temperature", "min_p"])
def _finish(
    temperature_ptr,  # [B] fp32 or None, as the next
    min_p_ptr,
    row_ptr,  # [2, B] fp32
    float_ptr,  # [3, B, D] fp32
    int_ptr,  # [2, B, D] i32
    sum_ptr,  # [2, B, n] fp32, or None
    token_ptr,  # [B] i64, written
    status_ptr,  # [B] i32, added to
    logprob_ptr,  # [B] fp32, written, or None, as the next two
    kept_ptr,  # [B] i32
    full_logprob_ptr,  # [B] fp32
    candidate_ptr,  # [3, B] fp32, written: maximum, score and logit of the winner; or None
    n,
    D,
    temperature: tl.float32,
    min_p: tl.float32,
    block_d: tl.constexpr,
    block_n: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    T, _ = temperature_and_cut(
        row_value(temperature_ptr, temperature, row, tl.float32),
        row_value(min_p_ptr, min_p, row, tl.float32),
    )
    m = tl.load(row_ptr + row)
    tau = tl.load(row_ptr + B + row)
    o_d = tl.arange(0, block_d)
    m_d = o_d < D
    p = float_ptr + row * D + o_d
    score, at = tl.max(tl.load(p, mask=m_d, other=-float("inf")), 0, return_indices=True)
    logit = tl.load(float_ptr + B * D + row * D + at)
    winner = tl.load(int_ptr + row * D + at)
    alive = m > -float("inf")
    wrong = tau == float("inf")
    tl.store(token_ptr + row, tl.where(alive, winner, 0).to(tl.int64))
    status = tl.load(status_ptr + row)
    tl.store(status_ptr + row, status + tl.where(alive, 0, 4) + tl.where(wrong, 8, 0))
    answered = alive & (tau < float("inf"))
    sampled = answered & (T > 0)
    above = tl.where(sampled, logit - m, 0.0) / tl.maximum(T, GREEDY_BELOW)
    if logprob_ptr is not None:
        mass = tl.sum(tl.load(p + 2 * B * D, mask=m_d, other=0.0), 0)
        tl.store(logprob_ptr + row, above - tl.log(tl.where(sampled, mass, 1.0)))
    if kept_ptr is not None:
        b_kept = tl.load(int_ptr + B * D + row * D + o_d, mask=m_d, other=0)
        tl.store(kept_ptr + row, tl.where(sampled, tl.sum(b_kept, 0), answered.to(tl.int32)))
    if full_logprob_ptr is not None:
        o_n = tl.arange(0, block_n)
        p_n = sum_ptr + row * n + o_n
        b_top = tl.load(p_n, mask=o_n < n, other=-float("inf"))
        b_sum = tl.load(p_n + B * n, mask=o_n < n, other=0.0)
        b_off = tl.where(b_top > -float("inf"), b_top - m, -float("inf"))
        whole = tl.sum(b_sum * tl.exp(b_off / tl.maximum(T, GREEDY_BELOW)), 0)
        tl.store(full_logprob_ptr + row, above - tl.log(tl.where(sampled, whole, 1.0)))
    if candidate_ptr is not None:
        tl.store(candidate_ptr + row, m)
        tl.store(candidate_ptr + B + row, score)
        tl.store(candidate_ptr + 2 * B + row, logit)


def parts_of(B: int, n: int) -> tuple[int, int]:
    """Programs of a row that draw, and sub-tiles of each."""
    groups = triton.cdiv(n, GROUP)
    most = min(groups, MOST_PARTS, max(1, DRAWING // B))
    depth = triton.cdiv(groups, most) * GROUP
    return triton.cdiv(n, depth), depth


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
    """Launches the three kernels, two where maxima are given, and one more for top-k and top-p.

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
    block_n = max(16, triton.next_power_of_2(n))
    D, depth = parts_of(B, n)
    p = parameters
    sums = new(2, B, n) if want & FULL_LOGPROB else None
    if maxima is None or sums is not None:
        maxima = new(B, n)
        T = 0.0 if sums is None else p.temperature  # without sums: one variant for any T
        write_maxima(logits, allowed, maxima, sums, T, tile=tile, splits=splits)
    rows, floats, ints = new(2, B), new(3, B, D), new(2, B, D, dtype=torch.int32)
    stream, stream_step = stream_and_step(p.stream)
    tensors, numbers = tensors_and_numbers(p.temperature, p.min_p, p.seed, p.position, stream)
    sizes = V, logits.stride(0), 0 if allowed is None else allowed.stride(0), n
    floor = None
    if p.truncated:
        floor = top_k_top_p(logits, maxima, p, allowed=allowed, tile=subtile)
    _draw[(B, D)](
        logits, allowed, floor, *tensors, known_maximum, maxima, rows, out.status, floats, ints,
        *sizes, depth, first_id, *numbers, stream_step, subtile, GROUP, block_n,
        measured=bool(want & (LOGPROB | KEPT)), num_warps=1,
    )  # fmt: skip
    _finish[(B,)](
        *tensors[:2], rows, floats, ints, sums, *out, n, D, *numbers[:2], MOST_PARTS, block_n,
        num_warps=1,
    )  # fmt: skip
    return out


_ROW = {"z_ptr": "*bf16", "allowed_ptr": "*i32"}
_SIZES = dict.fromkeys(("V", "stride", "words", "n", "depth"), "i32")
_DRAW = {
    **{**_ROW, "floor_ptr": "*fp32", **TENSORS},
    **{"known_ptr": "*fp32", "max_ptr": "*fp32", "row_ptr": "*fp32", "status_ptr": "*i32"},
    **{"float_ptr": "*fp32", "int_ptr": "*i32", **_SIZES, "first_id": "i32", **NUMBERS},
}
_FINISH = {
    **{"temperature_ptr": "*fp32", "min_p_ptr": "*fp32", "row_ptr": "*fp32", "float_ptr": "*fp32"},
    **{"int_ptr": "*i32", "sum_ptr": "*fp32", "token_ptr": "*i64", "status_ptr": "*i32"},
    **{"logprob_ptr": "*fp32", "kept_ptr": "*i32", "full_logprob_ptr": "*fp32"},
    **{"candidate_ptr": "*fp32", "n": "i32", "D": "i32", "temperature": "fp32", "min_p": "fp32"},
}


def _plain(kernel, signature: dict, missing: tuple[str, ...], constants: dict, warps: int) -> tuple:
    """An entry of `AOT` where some pointers are None."""
    types = {name: dtype for name, dtype in signature.items() if name not in missing}
    return kernel, types, {**dict.fromkeys(missing), **constants}, warps, 3


_DRAWN = {"subtile": SUBTILE, "group": GROUP, "block_n": 1024}
_FOUND = {"block_d": MOST_PARTS, "block_n": 1024}
_ASKED = ("sum_ptr", "logprob_ptr", "kept_ptr", "full_logprob_ptr", "candidate_ptr")
AOT = [  # the plain case, numbers for all rows and the token alone; then everything
    _plain(_draw, _DRAW, ("allowed_ptr", "floor_ptr", *TENSORS, "known_ptr"),
           {**_DRAWN, "measured": False}, 1),
    _plain(_draw, _DRAW, (), {**_DRAWN, "measured": True}, 1),
    _plain(_finish, _FINISH, ("temperature_ptr", "min_p_ptr", *_ASKED), _FOUND, 1),
    _plain(_finish, _FINISH, (), _FOUND, 1),
]  # fmt: skip
