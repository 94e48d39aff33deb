"""One token a row by Gumbel-max over the Min-P set.

    token = argmax_i z_i + T·g_i   over   z_i ≥ τ,      τ = max z + T·ln p_min

z + T·g has the order of z/T + g and needs no division; T = 0 (greedy) makes τ the maximum and silences the noise.

    1. _tile_max    grid [B, tiles]   m[b, t]: one read of z [B, V]
    2. _candidates  grid [B, tiles]   tiles with m < τ end at once; the others are read again: winner, count, Σ e^{(z−max)/T}
    3. _pick        grid [B]          merges `tiles` partials

NaN and +inf are taken out of the row and reported: status 1 = NaN seen, 2 = +inf seen, 4 = nothing finite (token 0).
"""

import torch
import triton
import triton.language as tl

from .philox import SAMPLE_DOMAIN, gumbel

TILE = 1024  # 2 KB of bf16: one 16-byte load a thread at 4 warps
GREEDY_BELOW = tl.constexpr(1e-3)


@triton.jit
def _load_tile(z_ptr, row, tile, V, stride, block: tl.constexpr):
    """Ids and fp32 logits of a tile; −inf beyond V. Full tiles load unmasked, so their loads are wide for any V."""
    o_v = tile * block + tl.arange(0, block)
    p_z = z_ptr + row * stride + o_v
    if (tile + 1) * block <= V:
        b_z = tl.load(p_z).to(tl.float32)
    else:
        b_z = tl.load(p_z, mask=o_v < V, other=-float("inf")).to(tl.float32)
    return o_v, b_z


@triton.jit
def _finite(b_z):
    """NaN and +inf become −inf."""
    return tl.where(b_z < float("inf"), b_z, -float("inf"))


@triton.jit
def _tile_max(
    z_ptr,  # [B, V] any float, row stride `stride`
    m_ptr,  # [B, tiles] fp32, written
    flag_ptr,  # [B, tiles] i32, written: 1 NaN, 2 +inf
    V,
    stride,
    tiles,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    _, b_z = _load_tile(z_ptr, row, tile, V, stride, block)
    tl.store(m_ptr + row * tiles + tile, tl.max(_finite(b_z), 0))
    nan = tl.max((b_z != b_z).to(tl.int32), 0)
    inf = tl.max((b_z == float("inf")).to(tl.int32), 0)
    tl.store(flag_ptr + row * tiles + tile, nan + 2 * inf)


@triton.jit
def _threshold(m_ptr, row, tiles, temperature, min_p, block_t: tl.constexpr):
    """Row maximum, τ and the temperature with greedy rows at 0."""
    o_t = tl.arange(0, block_t)
    m = tl.max(tl.load(m_ptr + row * tiles + o_t, mask=o_t < tiles, other=-float("inf")), 0)
    greedy = temperature < GREEDY_BELOW
    T = tl.where(greedy, 0.0, temperature)
    tau = m + tl.where(greedy, 0.0, temperature * tl.log(min_p))
    return m, tau, T


@triton.jit
def _candidates(
    z_ptr,  # [B, V]
    m_ptr,  # [B, tiles] fp32
    temperature_ptr,  # [B] fp32
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] i64
    position_ptr,  # [B] i64
    stream_ptr,  # [B] i64
    score_ptr,  # [B, tiles] fp32, written: −inf where the tile has no survivor
    id_ptr,  # [B, tiles] i32, written
    logit_ptr,  # [B, tiles] fp32, written: z of the winner
    kept_ptr,  # [B, tiles] i32, written
    mass_ptr,  # [B, tiles] fp32, written: Σ e^{(z − max)/T} over survivors
    V,
    stride,
    tiles,
    block: tl.constexpr,
    block_t: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    m, tau, T = _threshold(m_ptr, row, tiles, temperature, tl.load(min_p_ptr + row), block_t)
    score = -float("inf")
    winner = 0
    logit = -float("inf")
    kept = 0
    mass = 0.0
    tile_max = tl.load(m_ptr + row * tiles + tile)
    if (tile_max >= tau) & (tile_max > -float("inf")):
        o_v, b_z = _load_tile(z_ptr, row, tile, V, stride, block)
        b_z = _finite(b_z)
        m_kept = (b_z >= tau) & (b_z > -float("inf"))
        b_g = gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row).to(tl.int32),
                     tl.load(stream_ptr + row).to(tl.int32), o_v, SAMPLE_DOMAIN)  # fmt: skip
        b_score = tl.where(m_kept, b_z + T * b_g, -float("inf"))
        score = tl.max(b_score, 0)
        winner = tl.min(tl.where(m_kept & (b_score == score), o_v, V), 0)
        logit = tl.max(tl.where(o_v == winner, b_z, -float("inf")), 0)
        kept = tl.sum(m_kept.to(tl.int32), 0)
        b_e = tl.exp((b_z - m) / tl.maximum(T, GREEDY_BELOW))
        mass = tl.sum(tl.where(m_kept, b_e, 0.0), 0)
    o = row * tiles + tile
    tl.store(score_ptr + o, score)
    tl.store(id_ptr + o, winner)
    tl.store(logit_ptr + o, logit)
    tl.store(kept_ptr + o, kept)
    tl.store(mass_ptr + o, mass)


@triton.jit
def _pick(
    m_ptr,  # [B, tiles] fp32
    flag_ptr,  # [B, tiles] i32
    score_ptr,  # [B, tiles] fp32
    id_ptr,  # [B, tiles] i32
    logit_ptr,  # [B, tiles] fp32
    kept_ptr,  # [B, tiles] i32
    mass_ptr,  # [B, tiles] fp32
    temperature_ptr,  # [B] fp32
    token_ptr,  # [B] i64, written
    logprob_ptr,  # [B] fp32, written
    out_kept_ptr,  # [B] i32, written
    status_ptr,  # [B] i32, written
    tiles,
    block_t: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, block_t)
    m_t = o_t < tiles
    o = row * tiles + o_t
    m = tl.max(tl.load(m_ptr + o, mask=m_t, other=-float("inf")), 0)
    b_score = tl.load(score_ptr + o, mask=m_t, other=-float("inf"))
    b_id = tl.load(id_ptr + o, mask=m_t, other=0)
    best = tl.max(b_score, 0)
    alive = m > -float("inf")
    first = tl.min(tl.where(m_t & (b_score == best), o_t, block_t), 0)  # tiles are in id order: the first holds the lowest id
    token = tl.where(alive, tl.max(tl.where(o_t == first, b_id, 0), 0), 0)
    logit = tl.max(tl.where(o_t == first, tl.load(logit_ptr + o, mask=m_t, other=-float("inf")), -float("inf")), 0)
    kept = tl.sum(tl.load(kept_ptr + o, mask=m_t, other=0), 0)
    mass = tl.sum(tl.load(mass_ptr + o, mask=m_t, other=0.0), 0)
    b_flag = tl.load(flag_ptr + o, mask=m_t, other=0)
    nan = tl.max(b_flag & 1, 0)
    inf = tl.max(b_flag & 2, 0)
    temperature = tl.load(temperature_ptr + row)
    sampled = alive & (temperature >= GREEDY_BELOW)
    gap = tl.where(sampled, logit - m, 0.0)
    logprob = gap / tl.maximum(temperature, GREEDY_BELOW) - tl.log(tl.where(sampled, mass, 1.0))
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(sampled, logprob, 0.0))
    tl.store(out_kept_ptr + row, tl.where(sampled, kept, alive.to(tl.int32)))
    tl.store(status_ptr + row, nan + inf + tl.where(alive, 0, 4))


def min_p_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    stream: torch.Tensor,
    tile: int = TILE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launches the three kernels.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, unit stride along V.
        temperature, min_p: `[B]` fp32.
        seed, position, stream: `[B]` int64.
        tile: logits a program reads; the result does not depend on it.

    Returns:
        token `[B]` int64, logprob `[B]` fp32, kept `[B]` int32, status `[B]` int32.
    """
    B, V = logits.shape
    tiles = triton.cdiv(V, tile)
    block_t = triton.next_power_of_2(tiles)
    new = lambda *shape, dtype: torch.empty(*shape, dtype=dtype, device=logits.device)  # noqa: E731
    m, score, logit, mass = (new(B, tiles, dtype=torch.float32) for _ in range(4))
    flag, ids, kept = (new(B, tiles, dtype=torch.int32) for _ in range(3))
    token, logprob = new(B, dtype=torch.int64), new(B, dtype=torch.float32)
    out_kept, status = new(B, dtype=torch.int32), new(B, dtype=torch.int32)
    if B == 0:
        return token, logprob, out_kept, status
    stride = logits.stride(0)
    _tile_max[(B, tiles)](logits, m, flag, V, stride, tiles, tile)
    _candidates[(B, tiles)](
        logits, m, temperature, min_p, seed, position, stream, score, ids, logit, kept, mass,
        V, stride, tiles, tile, block_t,
    )  # fmt: skip
    _pick[(B,)](m, flag, score, ids, logit, kept, mass, temperature, token, logprob, out_kept, status, tiles, block_t)
    return token, logprob, out_kept, status


_PARTIALS = {"score_ptr": "*fp32", "id_ptr": "*i32", "logit_ptr": "*fp32", "kept_ptr": "*i32", "mass_ptr": "*fp32"}
_ROW = {
    "temperature_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "seed_ptr": "*i64",
    "position_ptr": "*i64",
    "stream_ptr": "*i64",
}
AOT = [
    (_tile_max, {"z_ptr": "*bf16", "m_ptr": "*fp32", "flag_ptr": "*i32", "V": "i32", "stride": "i32", "tiles": "i32"},
     {"block": TILE}, 4, 3),
    (_candidates, {"z_ptr": "*bf16", "m_ptr": "*fp32", **_ROW, **_PARTIALS, "V": "i32", "stride": "i32", "tiles": "i32"},
     {"block": TILE, "block_t": 256}, 4, 3),
    (_pick, {"m_ptr": "*fp32", "flag_ptr": "*i32", **_PARTIALS, "temperature_ptr": "*fp32", "token_ptr": "*i64",
             "logprob_ptr": "*fp32", "out_kept_ptr": "*i32", "status_ptr": "*i32", "tiles": "i32"},
     {"block_t": 256}, 4, 3),
]  # fmt: skip
