"""One token a row by Gumbel-max over the Min-P set, with one read of the logits.

    token = argmax_i z_i + T·g_i   over   z_i ≥ τ,      τ = max(max z + c, floor),   c = T·ln p_min

z + T·g has the order of z/T + g and needs no division; T = 0 (greedy) makes τ the maximum and
silences the noise.

    1. _scan    grid [B, S]  a split of the row, tile by tile: running maximum m; where a tile reaches m + c, noise for its
                             tokens ≥ m + c, and the best of them (score, id, z) is kept. Elsewhere
                             no noise is drawn.
    2. _finish  grid [B]     τ from all maxima; the best stored winner with z ≥ τ leads; a split is read again only if its
                             winner has z < τ and a score that reaches the leader's.
    3. _measure grid [B]     if asked: how many tokens are ≥ τ, and ln p of the token among them; reads the splits that reach τ.

What a split compares contains what is kept in the end, so a winner with z ≥ τ is the split's best
kept token, and a split whose winner scores less than the leader cannot hold a better one: the token
is that of the masked Gumbel-max, exactly.

With top-k or top-p the scan draws nothing, kernels/top_k_top_p.py finds `floor`, and finish reads
the splits that reach τ. NaN and +inf are taken out of the row and reported: status 1 = NaN seen, 2
= +inf seen, 4 = nothing finite or allowed (token 0). Where T, p_min, top-k or top-p is NaN or out
of range τ is +inf, which keeps nothing: status 8, token 0.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device
from .philox import SAMPLE_DOMAIN, gumbel
from .rows import (
    GREEDY_BELOW,
    LOWEST,
    TILE,
    finite,
    load_tile,
    row_or_number,
    row_parameters,
    row_value,
    splits_of,
    temperature_and_cut,
)
from .top_k_top_p import top_k_top_p


@triton.jit
def _best_of_tile(b_z, tile, first, tau, T, seed, position, stream, block: tl.constexpr):
    """Score, id and logit of a tile's best token with z ≥ τ; −inf if there is none. Ties go to the
    lowest id."""
    o_g = first // 4 + tile * (block // 4) + tl.arange(0, block // 4)
    b_g = gumbel(seed, position, stream, o_g, [block], SAMPLE_DOMAIN)
    b_score = tl.where((b_z >= tau) & (b_z > -float("inf")), b_z + T * b_g, -float("inf"))
    score, at = tl.max(b_score, 0, return_indices=True)
    return (
        score,
        first + tile * block + at,
        tl.max(tl.where(tl.arange(0, block) == at, b_z, -float("inf")), 0),
    )


_NUMBERS = [
    "first",
    "temperature",
    "min_p",
    "seed",
    "position",
    "stream",
    "stream_step",
    "S",
    "depth",
]


@triton.jit(do_not_specialize=_NUMBERS)
def _scan(
    z_ptr,  # [B, V] any float, row stride `stride`
    allowed_ptr,  # [B, words] i32 bits, or None
    temperature_ptr,  # [B] fp32 or None, as the next four
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] i64
    position_ptr,  # [B] i64
    stream_ptr,  # [B] i64
    known_ptr,  # [B] fp32: a lower bound of the row's maximum, or None
    float_ptr,  # [4, B, S] fp32, written: maximum, winner's score, winner's logit, Σ e^{(z − maximum)/T}
    int_ptr,  # [2, B, S] i32, written: winner's id; 1 NaN, 2 +inf
    V,
    stride,
    words,
    S,
    depth,  # tiles a split
    first,  # id of column 0, a multiple of 4
    temperature,
    min_p,
    seed,
    position,
    stream,
    stream_step,  # stream = stream + row·stream_step
    block: tl.constexpr,
    draw: tl.constexpr,
    whole_mass: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    T, c, key, place, lane = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    m = -float("inf")
    if known_ptr is not None:
        m = tl.load(known_ptr + row)
        m = tl.where(
            m < float("inf"), m, float("inf")
        )  # NaN is as wrong as +inf: nothing reaches it
    score = -float("inf")
    logit = -float("inf")
    mass = 0.0
    winner = 0
    flag = 0
    for tile in range(split * depth, tl.minimum((split + 1) * depth, tl.cdiv(V, block))):
        b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
        top = tl.max(
            tl.where(b_z < float("inf"), b_z, float("inf")), 0
        )  # +inf also where there is a NaN
        if top == float("inf"):
            flag |= tl.max((b_z != b_z).to(tl.int32), 0) | (
                2 * tl.max((b_z == float("inf")).to(tl.int32), 0)
            )
            b_z = finite(b_z)
            top = tl.max(b_z, 0)
        new = tl.maximum(m, top)
        if whole_mass:
            heat = tl.maximum(T, GREEDY_BELOW)
            here = tl.sum(tl.where(b_z > -float("inf"), tl.exp((b_z - new) / heat), 0.0), 0)
            mass = tl.where(m > -float("inf"), mass * tl.exp((m - new) / heat), 0.0) + here
        m = new
        if draw:
            if (top >= m + c) & (top > -float("inf")):
                s, i, z = _best_of_tile(b_z, tile, first, m + c, T, key, place, lane, block)
                if s > score:
                    score = s
                    winner = i
                    logit = z
    if not draw:
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


@triton.jit
def leader(float_ptr, int_ptr, floor_ptr, row, S, c, block_s: tl.constexpr):
    """What a row's partials say before any second look.

    Returns its maximum and τ; score, id and logit of the best winner with z ≥ τ; the scores of
    splits that reach τ but whose winner does not (−inf elsewhere), `[block_s]`; the union of the
    flags.
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
    if floor_ptr is not None:
        tau = tl.maximum(tau, tl.load(floor_ptr + row))
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
    heat = tl.maximum(T, GREEDY_BELOW)
    mass = tl.sum(tl.where(b_max > -float("inf"), b_mass * tl.exp((b_max - m) / heat), 0.0), 0)
    sampled = (m > -float("inf")) & (T > 0)
    return tl.where(sampled, logit - m, 0.0) / heat - tl.log(tl.where(sampled, mass, 1.0))


@triton.jit(do_not_specialize=_NUMBERS)
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
    partial_ptr,  # [3, B] fp32, written: maximum, score and logit of the winner; or None
    V,
    stride,
    words,
    S,
    depth,
    first,
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
    T, c, key, place, lane = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    m, tau, score, winner, logit, b_open, flag = leader(
        float_ptr, int_ptr, floor_ptr, row, S, c, block_s
    )
    claim, split = tl.max(b_open, 0, return_indices=True)
    tiles = tl.cdiv(V, block)
    while (claim >= score) & (claim > -float("inf")):
        for tile in range(split * depth, tl.minimum((split + 1) * depth, tiles)):
            b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
            b_z = finite(b_z)
            if tl.max(b_z, 0) >= tau:
                s, i, z = _best_of_tile(b_z, tile, first, tau, T, key, place, lane, block)
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
    if partial_ptr is not None:
        B = tl.num_programs(0).to(tl.int64)
        tl.store(partial_ptr + row, m)
        tl.store(partial_ptr + B + row, score)
        tl.store(partial_ptr + 2 * B + row, logit)
    if full_logprob_ptr is not None:
        T = tl.where(wrong, 0.0, T)
        tl.store(full_logprob_ptr + row, whole_logprob(float_ptr, row, S, m, T, logit, block_s))


@triton.jit(do_not_specialize=_NUMBERS)
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
    heat = tl.maximum(T, GREEDY_BELOW)
    kept = 0
    mass = 0.0
    for split in range(0, S):
        if (tl.load(m_ptr + row * S + split) >= tau) & sampled:
            for tile in range(split * depth, tl.minimum((split + 1) * depth, tl.cdiv(V, block))):
                b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
                b_z = finite(b_z)
                b_in = (b_z >= tau) & (b_z > -float("inf"))
                kept += tl.sum(b_in.to(tl.int32), 0)
                mass += tl.sum(tl.where(b_in, tl.exp((b_z - m) / heat), 0.0), 0)
    logit = tl.load(z_ptr + row * stride + tl.load(token_ptr + row)).to(tl.float32)
    logprob = tl.where(sampled, logit - m, 0.0) / heat - tl.log(tl.where(sampled, mass, 1.0))
    tl.store(logprob_ptr + row, logprob)
    tl.store(kept_ptr + row, tl.where(sampled, kept, alive.to(tl.int32)))


@on_its_device
def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor | float,
    min_p: torch.Tensor | float,
    seed: torch.Tensor | int,
    position: torch.Tensor | int,
    stream: torch.Tensor | int | None,
    *,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    allowed: torch.Tensor | None = None,
    first: int = 0,
    known: torch.Tensor | None = None,
    want: tuple[str, ...] = (),
    tile: int = TILE,
    splits: int | None = None,
) -> dict[str, torch.Tensor]:
    """Launches the two kernels; one more for top-k and top-p, one more for logprob and kept.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, unit stride along V.
        temperature, min_p: `[B]` fp32 or a number.
        seed, position, stream: `[B]` int64 or a number; stream None is the row index.
        top_k: `[B]` int64 or a number; 0 is off.
        top_p: `[B]` fp32 or a number; 1 is off.
        allowed: `[B, ⌈V/32⌉]` int32: bit i % 32 of word i // 32 allows id i.
        first: id of column 0, a multiple of 4: the logits are a part of a vocabulary.
        known: `[B]` fp32 maxima of the whole vocabulary, or lower bounds of them, that τ shall take
            into account.
        want: names among logprob, full_logprob, kept and partial.
        tile: logits a program reads at once; neither it nor `splits` changes the result.
        splits: parts of a row; None chooses.

    Returns:
        token `[B]` int64, status `[B]` int32, and what is wanted: fp32 `[B]`, int32 `[B]` (kept) or
        fp32 `[3, B]` (partial: the maximum, and score and logit of the winner, −inf without one).
    """
    B, V = logits.shape
    S, depth = splits_of(B, V, tile)
    if splits is not None:
        depth = triton.cdiv(triton.cdiv(V, tile), splits)
        S = triton.cdiv(triton.cdiv(V, tile), depth)
    new = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=logits.device)
    kinds = {"token": torch.int64, "status": torch.int32, "kept": torch.int32}
    shapes = {"partial": (3, B)}
    out = {
        name: new(*shapes.get(name, (B,)), dtype=kinds.get(name, torch.float32))
        for name in ("token", "status", *want)
    }
    if B == 0:
        return out
    floats, ints = new(4, B, S, dtype=torch.float32), new(2, B, S, dtype=torch.int32)
    stream, step = (0, 1) if stream is None else (stream, 0)
    rows, numbers = zip(*map(row_or_number, (temperature, min_p, seed, position, stream)))
    words = 0 if allowed is None else allowed.stride(0)
    shape = V, logits.stride(0), words, S, depth
    sizes = *shape, first, *numbers, step, tile
    truncated = (
        isinstance(top_k, torch.Tensor) or isinstance(top_p, torch.Tensor) or top_k > 0 or top_p < 1
    )
    _scan[(B, S)](
        logits, allowed, *rows, known, floats, ints, *sizes, not truncated, "full_logprob" in want
    )
    options = {"allowed": allowed, "tile": tile}
    floor = (
        top_k_top_p(logits, floats[0], depth, temperature, top_k, top_p, **options)
        if truncated
        else None
    )
    block_s = max(16, triton.next_power_of_2(S))
    results = out["token"], out["status"], out.get("full_logprob"), out.get("partial")
    _finish[(B,)](logits, allowed, floor, *rows, floats, ints, *results, *sizes, block_s)
    if "logprob" in want or "kept" in want:
        measured = [
            out[name] if name in out else new(B, dtype=kinds.get(name, torch.float32))
            for name in ("logprob", "kept")
        ]
        _measure[(B,)](
            logits,
            allowed,
            floor,
            *rows[:2],
            floats,
            out["token"],
            *measured,
            *shape,
            *numbers[:2],
            tile,
            block_s,
        )
    return out


_ROWS = {
    "temperature_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "seed_ptr": "*i64",
    "position_ptr": "*i64",
    "stream_ptr": "*i64",
}
_SIZES = {
    **dict.fromkeys(("V", "stride", "words", "S", "depth", "first"), "i32"),
    **{
        "temperature": "fp32",
        "min_p": "fp32",
        "seed": "i64",
        "position": "i64",
        "stream": "i64",
        "stream_step": "i32",
    },
}
_DATA = {
    "z_ptr": "*bf16",
    "allowed_ptr": "*i32",
    **_ROWS,
    "known_ptr": "*fp32",
    "float_ptr": "*fp32",
    "int_ptr": "*i32",
    **_SIZES,
}
_OUT = {"token_ptr": "*i64", "status_ptr": "*i32"}
_FLOOR, _FULL = {"floor_ptr": "*fp32"}, {"full_logprob_ptr": "*fp32", "partial_ptr": "*fp32"}
_MEASURED = {
    "token_ptr": "*i64",
    "logprob_ptr": "*fp32",
    "kept_ptr": "*i32",
    "m_ptr": "*fp32",
    **_FLOOR,
}
_NO_ROWS = {"allowed_ptr": None, **dict.fromkeys(_ROWS)}
_NOTHING = {"floor_ptr": None, "full_logprob_ptr": None, "partial_ptr": None}


def _without(signature: dict, names: dict) -> dict:
    return {name: kind for name, kind in signature.items() if name not in names}


AOT = [  # the plain case, numbers for all rows and the token alone; then everything
    (_scan, _without(_DATA, {**_NO_ROWS, "known_ptr": None}),
     {**_NO_ROWS, "known_ptr": None, "block": TILE, "draw": True, "whole_mass": False}, 4, 3),
    (_scan, _DATA, {"block": TILE, "draw": True, "whole_mass": True}, 4, 3),
    (_finish, _without({**_DATA, **_OUT}, _NO_ROWS),
     {**_NO_ROWS, **_NOTHING, "block": TILE, "block_s": 256}, 4, 3),
    (_finish, {**_DATA, **_OUT, **_FLOOR, **_FULL}, {"block": TILE, "block_s": 256}, 4, 3),
    (_measure, {**_DATA, **_MEASURED}, {"block": TILE, "block_s": 256}, 4, 3),
]  # fmt: skip
