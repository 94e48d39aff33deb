"""Hidden states to tokens: the Min-P draw on the tiles of the LM head's product.

    z[b, v] = softcap·tanh(scale·(Σ_h x[b, h]·w[v, h] + bias[v]) / softcap)     (never in memory)
    token[b] = argmax_v z + T·g   over   z ≥ max z + c,    c = T·ln p_min

    1. _tiles   grid [⌈B/rows⌉, S]  products of x [B, H] and w [V, H] in tiles [rows, block] through
                                    a split of V; what it leaves: kernels/candidates.py
    2. _settle  grid [B]            joins a row's S candidates; a split that might hold a better
                                    token is multiplied again, in the same tiles and the same order
                                    along H: its logits are the same bit for bit

fp32 operands are multiplied in fp32 (not TF32): a tie must not depend on the unit.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.sampling import FULL_LOGPROB, Sampled, SamplingParameters

from .candidates import best_candidate, whole_logprob
from .device import on_its_device
from .lm_head_tiles import product_tile
from .logit_tiles import finite
from .philox import SAMPLE_DOMAIN, gumbel
from .row_parameters import (
    GREEDY_BELOW,
    NUMBERS,
    TENSORS,
    row_parameters,
    stream_and_step,
    tensors_and_numbers,
)

BLOCK, DEPTH_H, STAGES = 64, 64, 4  # wider tiles spill: noise is drawn for a whole tile at once
# More stages spill on sm_80; warps stay those of _tiles, so that the product is the same.
SETTLE_STAGES = 2
# Two for each multiprocessor of an H100; more splits mean more first tiles, and those always draw
# noise.
PROGRAMS = 264


@triton.jit
def _candidates(
    b_z, b_least, T, seed, position, stream, tile, rows: tl.constexpr, block: tl.constexpr
):
    """Score, id and logit of the best token ≥ least in each row of a tile, as are T … stream."""
    o_g = tile * (block // 4) + tl.arange(0, block // 4)
    o_g = o_g[None, :] + tl.zeros((rows, 1), tl.int32)
    shape: tl.constexpr = [rows, block]
    b_g = gumbel(seed[:, None], position[:, None], stream[:, None], o_g, shape, SAMPLE_DOMAIN)
    m_kept = (b_z >= b_least[:, None]) & (b_z > -float("inf"))
    b_s, b_at = tl.max(
        tl.where(m_kept, b_z + T[:, None] * b_g, -float("inf")), 1, return_indices=True
    )
    m_best = tl.arange(0, block)[None, :] == b_at[:, None]
    return b_s, tile * block + b_at, tl.max(tl.where(m_best, b_z, -float("inf")), 1)


@triton.jit
def _maximum(b_x, rows: tl.constexpr):
    """Of `[rows]`. Doubled, because Triton 3.7 fails on a plain one here when it compiles for
    sm_100."""
    return tl.max(tl.reshape(tl.join(b_x, b_x), [2 * rows]), 0)


_UNSPECIALIZED = ["B", "S", "depth", "scale", *NUMBERS]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _tiles(
    x_ptr,  # [B, H] any float, row stride x_stride
    w_ptr,  # [V, H] of the same type, row stride w_stride
    bias_ptr,  # [V] any float, or None
    temperature_ptr,  # [B] fp32 or None, as the next four
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] i64
    position_ptr,  # [B] i64
    stream_ptr,  # [B] i64
    float_ptr,  # [4, B, S] fp32, written, as the next: kernels/candidates.py
    int_ptr,  # [2, B, S] i32
    B,
    V,
    H,
    x_stride,
    w_stride,
    S,
    depth,  # tiles a split
    scale,
    softcap,
    temperature,
    min_p,
    seed,
    position,
    stream,
    stream_step,
    rows: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
    upcast: tl.constexpr,
    whole_mass: tl.constexpr,
):
    row0 = tl.program_id(0) * rows
    o_b = row0 + tl.arange(0, rows)
    split = tl.program_id(1)
    m_b = o_b < B
    row = tl.minimum(o_b, B - 1).to(tl.int64)
    zero = tl.zeros((rows,), tl.float32)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    whole = zero.to(tl.int64)  # numbers become blocks
    T, c = zero + T, zero + c
    row_seed, row_position = whole + row_seed, whole + row_position
    row_stream = whole + row_stream
    divisor = tl.maximum(T, GREEDY_BELOW)
    b_max = zero - float("inf")
    b_score = zero - float("inf")
    b_logit = zero - float("inf")
    b_mass = zero
    b_id = zero.to(tl.int32)
    b_flag = zero.to(tl.int32)
    for tile in range(split * depth, tl.minimum((split + 1) * depth, tl.cdiv(V, block))):
        b_z = product_tile(
            x_ptr, w_ptr, bias_ptr, row0, tile, B, V, H, x_stride, w_stride, scale, softcap,
            rows, block, step, upcast,
        )  # fmt: skip
        b_flag |= tl.max((b_z != b_z).to(tl.int32), 1)
        b_flag |= 2 * tl.max((b_z == float("inf")).to(tl.int32), 1)
        b_z = finite(b_z)
        b_top = tl.max(b_z, 1)
        b_new = tl.maximum(b_max, b_top)
        if whole_mass:
            b_x = (b_z - b_new[:, None]) / divisor[:, None]
            b_e = tl.where(b_z > -float("inf"), tl.exp(b_x), 0.0)
            b_moved = b_mass * tl.exp((b_max - b_new) / divisor)
            b_mass = tl.where(b_max > -float("inf"), b_moved, 0.0) + tl.sum(b_e, 1)
        b_max = b_new
        b_least = b_max + c
        m_live = m_b & (b_top >= b_least) & (b_top > -float("inf"))
        if _maximum(m_live.to(tl.int32), rows) > 0:
            b_s, b_at, b_won = _candidates(
                b_z, b_least, T, row_seed, row_position, row_stream, tile, rows, block
            )
            m_better = m_live & (b_s > b_score)
            b_score = tl.where(m_better, b_s, b_score)
            b_id = tl.where(m_better, b_at, b_id)
            b_logit = tl.where(m_better, b_won, b_logit)
    plane = tl.cast(B, tl.int64) * S
    o = row * S + split
    tl.store(float_ptr + o, b_max, mask=m_b)
    tl.store(float_ptr + plane + o, b_score, mask=m_b)
    tl.store(float_ptr + 2 * plane + o, b_logit, mask=m_b)
    if whole_mass:
        tl.store(float_ptr + 3 * plane + o, b_mass, mask=m_b)
    tl.store(int_ptr + o, b_id, mask=m_b)
    tl.store(int_ptr + plane + o, b_flag, mask=m_b)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _settle(
    x_ptr,  # [B, H]
    w_ptr,  # [V, H]
    bias_ptr,  # [V] or None
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
    B,
    V,
    H,
    x_stride,
    w_stride,
    S,
    depth,
    scale,
    softcap,
    temperature,
    min_p,
    seed,
    position,
    stream,
    stream_step,
    rows: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
    upcast: tl.constexpr,
    block_s: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    m, tau, score, winner, logit, b_open, flag = best_candidate(
        float_ptr, int_ptr, row, S, c, block_s
    )
    claim, split = tl.max(b_open, 0, return_indices=True)
    row0 = tl.program_id(0) // rows * rows
    m_row = row0 + tl.arange(0, rows) == tl.program_id(0)
    zero = tl.zeros((rows,), tl.float32)
    whole = zero.to(tl.int64)
    while (claim >= score) & (claim > -float("inf")):
        for tile in range(split * depth, tl.minimum((split + 1) * depth, tl.cdiv(V, block))):
            b_tile = product_tile(
                x_ptr, w_ptr, bias_ptr, row0, tile, B, V, H, x_stride, w_stride, scale, softcap,
                rows, block, step, upcast,
            )  # fmt: skip
            b_tile = finite(b_tile)
            b_s, b_at, b_won = _candidates(
                b_tile, zero + tau, zero + T, row_seed + whole, row_position + whole,
                row_stream + whole, tile, rows,
                block,
            )  # fmt: skip
            s = _maximum(tl.where(m_row, b_s, -float("inf")), rows)
            i = _maximum(tl.where(m_row, b_at, 0), rows)
            if (s > score) | ((s == score) & (i < winner)):
                score = s
                winner = i
                logit = _maximum(tl.where(m_row, b_won, -float("inf")), rows)
        b_open = tl.where(tl.arange(0, block_s) == split, -float("inf"), b_open)
        claim, split = tl.max(b_open, 0, return_indices=True)
    alive = m > -float("inf")
    tl.store(token_ptr + row, tl.where(alive, winner, 0).to(tl.int64))
    wrong = tau == float("inf")
    tl.store(status_ptr + row, flag + tl.where(alive, 0, 4) + tl.where(wrong, 8, 0))
    if full_logprob_ptr is not None:
        T = tl.where(wrong, 0.0, T)
        tl.store(full_logprob_ptr + row, whole_logprob(float_ptr, row, S, m, T, logit, block_s))


def tile_shape(B: int) -> tuple[int, int]:
    """Rows of a tile, 16 at least for the matrix unit and 64 at most; warps."""
    rows = min(64, max(16, triton.next_power_of_2(B)))
    return rows, 8 if rows == 64 else 4


@on_its_device
def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    parameters: SamplingParameters,
    *,
    want: int = 0,
    splits: int | None = None,
) -> Sampled:
    """Launches the two kernels.

    Args:
        hidden: `[B, H]` bf16, fp16 or fp32, unit stride along H.
        weight: `[V, H]` of the same dtype, unit stride along H.
        bias: `[V]` or None.
        parameters: of the rows, without top-k and top-p.
        want: FULL_LOGPROB, or 0.
        splits: of V, at most; None chooses. The result does not depend on it.
    """
    B, H = hidden.shape
    V = weight.shape[0]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    full_logprob = new(B) if want & FULL_LOGPROB else None
    token, status = new(B, dtype=torch.int64), new(B, dtype=torch.int32)
    out = Sampled(token, status, full_logprob=full_logprob)
    if B == 0:
        return out
    (rows, warps), tiles = tile_shape(B), triton.cdiv(V, BLOCK)
    splits = min(tiles, splits or max(8, PROGRAMS // triton.cdiv(B, rows)))
    depth = triton.cdiv(tiles, splits)
    S = triton.cdiv(tiles, depth)
    block_s = max(16, triton.next_power_of_2(S))
    floats, ints = new(4, B, S), new(2, B, S, dtype=torch.int32)
    p = parameters
    stream, stream_step = stream_and_step(p.stream)
    tensors, numbers = tensors_and_numbers(p.temperature, p.min_p, p.seed, p.position, stream)
    data = hidden, weight, bias, *tensors, floats, ints
    scalars = (
        B, V, H, hidden.stride(0), weight.stride(0), S, depth, logit_scale, softcap,
        *numbers, stream_step,
        rows, BLOCK, DEPTH_H, hidden.dtype == torch.bfloat16 and not hidden.is_cuda,
    )  # fmt: skip
    _tiles[(triton.cdiv(B, rows), S)](
        *data, *scalars, full_logprob is not None, num_warps=warps, num_stages=STAGES
    )
    _settle[(B,)](
        *data, token, status, full_logprob, *scalars, block_s,
        num_warps=warps, num_stages=SETTLE_STAGES,
    )  # fmt: skip
    return out


_DATA = {
    **dict.fromkeys(("x_ptr", "w_ptr"), "*bf16"),
    **TENSORS,
    **{"float_ptr": "*fp32", "int_ptr": "*i32", "token_ptr": "*i64", "status_ptr": "*i32"},
    **dict.fromkeys(("B", "V", "H", "x_stride", "w_stride", "S", "depth"), "i32"),
    "scale": "fp32",
    **NUMBERS,
}
_PLAIN = {"bias_ptr": None, "softcap": None, "block": BLOCK, "step": DEPTH_H, "upcast": False}


def _tiles_of(B: int) -> tuple:
    rows, warps = tile_shape(B)
    return (_tiles, _DATA, {**_PLAIN, "rows": rows, "whole_mass": False}, warps, STAGES)


_SETTLE = {**_PLAIN, "full_logprob_ptr": None, "rows": 64, "block_s": 512}
AOT = [_tiles_of(1), _tiles_of(64), (_settle, _DATA, _SETTLE, 8, SETTLE_STAGES)]
