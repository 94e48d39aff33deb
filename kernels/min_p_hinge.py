"""The Min-P hinge and its slope in T, in one pass.

    T*[n] = gap[n] / (−ln p_min)                gap = max z − z_y ≥ 0
    ℓ[n]  = w[n]·(relu(T*[n] − T[n])^power + λ·T[n])
    ℓ'[n] = w[n]·(λ − power·relu(T*[n] − T[n])^(power−1)·[T* > T])
    loss  = Σ ℓ / Σ w over kept rows            (0 when none is kept)

Rows with rank < 0 are ignored; rows with T* > T_max are dropped, or their T* is clipped; a row of
NaN is not, and its loss is NaN. Reads 16 bytes a row (20 weighted), writes 8; sums go through one
partial a block, added in a fixed order.
The backward is a product with ℓ'.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device
from .extrema import at_least, at_most

BLOCK, WARPS = 1024, 8  # four rows a thread: with eight, ptxas spills two words on sm_90


@triton.jit(do_not_specialize=["N", "blocks"])
def _hinge(
    t_ptr,  # [N] fp32
    gap_ptr,  # [N] fp32
    rank_ptr,  # [N] i64
    w_ptr,  # [N] fp32 or None
    loss_ptr,  # [N] fp32, written: ℓ
    slope_ptr,  # [N] fp32, written: ℓ'
    partial_ptr,  # [2, blocks] fp32, written: Σ ℓ, Σ w
    N,
    blocks,
    inv,
    t_max,
    gravity,
    power: tl.constexpr,
    clip: tl.constexpr,
    block: tl.constexpr,
):
    pid = tl.program_id(0)
    o_n = pid.to(tl.int64) * block + tl.arange(0, block)
    m_n = o_n < N
    b_t = tl.load(t_ptr + o_n, mask=m_n, other=0.0)
    b_required = tl.load(gap_ptr + o_n, mask=m_n, other=0.0) * inv
    m_kept = m_n & (tl.load(rank_ptr + o_n, mask=m_n, other=-1) >= 0)
    if clip:
        b_required = at_most(b_required, t_max)
    else:
        m_kept = m_kept & ~(b_required > t_max)
    if w_ptr is None:
        b_w = tl.where(m_kept, 1.0, 0.0)
    else:
        b_w = tl.where(m_kept, tl.load(w_ptr + o_n, mask=m_n, other=0.0), 0.0)
    b_h = at_least(b_required - b_t, 0.0)
    if power == 2:
        b_slope = 2.0 * b_h
        b_h = b_h * b_h
    else:
        b_slope = tl.where(b_h > 0, 1.0, 0.0)
    b_loss = tl.where(b_w != 0, b_w * (b_h + gravity * b_t), 0.0)
    b_slope = tl.where(b_w != 0, b_w * (gravity - b_slope), 0.0)
    tl.store(loss_ptr + o_n, b_loss, mask=m_n)
    tl.store(slope_ptr + o_n, b_slope, mask=m_n)
    tl.store(partial_ptr + pid, tl.sum(b_loss, 0))
    tl.store(partial_ptr + blocks + pid, tl.sum(b_w, 0))


@on_its_device
def min_p_hinge(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    power: int,
    max_temperature: float,
    clip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss `[N]`, its slope `[N]`, Σ loss `[]` and Σ weight `[]`, fp32.

    Args:
        temperature, gap, weight: `[N]` fp32, contiguous; rank `[N]` int64.
        inv: `1 / (−ln p_min)`.
    """
    N = temperature.shape[0]
    blocks = max(1, triton.cdiv(N, BLOCK))
    loss, slope = torch.empty_like(temperature), torch.empty_like(temperature)
    partial = torch.empty(2, blocks, dtype=torch.float32, device=temperature.device)
    _hinge[(blocks,)](
        temperature, gap, rank, weight, loss, slope, partial, N, blocks, inv, max_temperature,
        gravity, power, clip, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return loss, slope, partial[0].sum(), partial[1].sum()


_SIGNATURE = {
    **{"t_ptr": "*fp32", "gap_ptr": "*fp32", "rank_ptr": "*i64", "w_ptr": "*fp32"},
    **{"loss_ptr": "*fp32", "slope_ptr": "*fp32", "partial_ptr": "*fp32"},
    **{"N": "i32", "blocks": "i32", "inv": "fp32", "t_max": "fp32", "gravity": "fp32"},
}
AOT = [(_hinge, _SIGNATURE, {"power": 2, "clip": False, "block": BLOCK}, WARPS, None)]
