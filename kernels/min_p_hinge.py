"""The Min-P hinge, forward and backward, one pass each.

    T*[n] = gap[n] / (−ln p_min)                gap = max z − z_y ≥ 0
    ℓ[n]  = w[n]·(relu(T*[n] − T[n])^power + λ·T[n])
    loss  = Σ ℓ / Σ w over kept rows            (0 when none is kept)
    dT[n] = w[n]·(λ − power·relu(T*[n] − T[n])^(power−1)·[T* > T]) · g[n]

Rows with rank < 0 are ignored; rows with T* > T_max are dropped, or their T* is clipped. Reads 16
bytes a row (20 weighted), writes 4; sums go through one partial a block, added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device

BLOCK, WARPS = 1024, 8  # four rows a thread: with eight, ptxas spills two words on sm_90


@triton.jit
def _load(
    t_ptr,
    gap_ptr,
    rank_ptr,
    w_ptr,
    o_n,
    m_n,
    inv,
    t_max,
    clip: tl.constexpr,
    weighted: tl.constexpr,
):
    """T, T* and the weight (0 for rows that do not count) of a block of rows."""
    b_t = tl.load(t_ptr + o_n, mask=m_n, other=0.0)
    b_required = tl.load(gap_ptr + o_n, mask=m_n, other=0.0) * inv
    m_kept = m_n & (tl.load(rank_ptr + o_n, mask=m_n, other=-1) >= 0)
    if clip:
        b_required = tl.minimum(b_required, t_max)
    else:
        m_kept = m_kept & (b_required <= t_max)
    if weighted:
        b_w = tl.load(w_ptr + o_n, mask=m_n, other=0.0)
    else:
        b_w = tl.full(o_n.shape, 1.0, tl.float32)
    return b_t, b_required, tl.where(m_kept, b_w, 0.0)


@triton.jit(do_not_specialize=["N", "blocks"])
def _hinge_fwd(
    t_ptr,  # [N] fp32
    gap_ptr,  # [N] fp32
    rank_ptr,  # [N] i64
    w_ptr,  # [N] fp32 or unused
    loss_ptr,  # [N] fp32, written
    partial_ptr,  # [2, blocks] fp32, written: Σ ℓ, Σ w
    N,
    blocks,
    inv,
    t_max,
    gravity,
    power: tl.constexpr,
    clip: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    pid = tl.program_id(0)
    o_n = pid.to(tl.int64) * block + tl.arange(0, block)
    m_n = o_n < N
    b_t, b_required, b_w = _load(
        t_ptr, gap_ptr, rank_ptr, w_ptr, o_n, m_n, inv, t_max, clip, weighted
    )
    b_h = tl.maximum(b_required - b_t, 0.0)
    if power == 2:
        b_h = b_h * b_h
    b_loss = tl.where(b_w != 0, b_w * (b_h + gravity * b_t), 0.0)
    tl.store(loss_ptr + o_n, b_loss, mask=m_n)
    tl.store(partial_ptr + pid, tl.sum(b_loss, 0))
    tl.store(partial_ptr + blocks + pid, tl.sum(b_w, 0))


@triton.jit(do_not_specialize=["N"])
def _hinge_bwd(
    t_ptr,  # [N] fp32
    gap_ptr,  # [N] fp32
    rank_ptr,  # [N] i64
    w_ptr,  # [N] fp32 or unused
    g_ptr,  # [N] fp32, any stride (0: one gradient for all)
    dt_ptr,  # [N] fp32, written
    N,
    g_stride,
    inv,
    t_max,
    gravity,
    power: tl.constexpr,
    clip: tl.constexpr,
    weighted: tl.constexpr,
    block: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    m_n = o_n < N
    b_t, b_required, b_w = _load(
        t_ptr, gap_ptr, rank_ptr, w_ptr, o_n, m_n, inv, t_max, clip, weighted
    )
    b_g = tl.load(g_ptr + o_n * g_stride, mask=m_n, other=0.0)
    b_slope = tl.where(b_required > b_t, 1.0, 0.0)
    if power == 2:
        b_slope = 2.0 * tl.maximum(b_required - b_t, 0.0)
    tl.store(dt_ptr + o_n, tl.where(b_w != 0, b_g * b_w * (gravity - b_slope), 0.0), mask=m_n)


@on_its_device
def hinge_forward(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    power: int,
    max_temperature: float,
    clip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-row loss `[N]`, Σ loss `[]` and Σ weight `[]`, fp32.

    Args:
        temperature, gap, weight: `[N]` fp32, contiguous; rank `[N]` int64.
        inv: `1 / (−ln p_min)`.
    """
    N = temperature.shape[0]
    blocks = max(1, triton.cdiv(N, BLOCK))
    loss = torch.empty_like(temperature)
    partial = torch.empty(2, blocks, dtype=torch.float32, device=temperature.device)
    _hinge_fwd[(blocks,)](
        temperature, gap, rank, temperature if weight is None else weight, loss, partial, N, blocks,
        inv, max_temperature, gravity, power, clip, weight is not None, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    total, weight_sum = partial.sum(1)
    return loss, total.clone(), weight_sum.clone()


@on_its_device
def hinge_backward(
    grad: torch.Tensor,
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    power: int,
    max_temperature: float,
    clip: bool,
) -> torch.Tensor:
    """dT `[N]` fp32 from `grad` `[N]` fp32 of any stride, the gradient of each row's loss."""
    N = temperature.shape[0]
    dt = torch.empty_like(temperature)
    _hinge_bwd[(max(1, triton.cdiv(N, BLOCK)),)](
        temperature, gap, rank, temperature if weight is None else weight, grad, dt, N,
        grad.stride(0),
        inv, max_temperature, gravity, power, clip, weight is not None, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return dt


_IN = {"t_ptr": "*fp32", "gap_ptr": "*fp32", "rank_ptr": "*i64", "w_ptr": "*fp32"}
_SCALARS = {"inv": "fp32", "t_max": "fp32", "gravity": "fp32"}
_CONFIG = {"power": 2, "clip": False, "weighted": True, "block": BLOCK}
AOT = [
    (
        _hinge_fwd,
        {
            **_IN,
            "loss_ptr": "*fp32",
            "partial_ptr": "*fp32",
            "N": "i32",
            "blocks": "i32",
            **_SCALARS,
        },
        _CONFIG,
        WARPS,
        3,
    ),
    (
        _hinge_bwd,
        {**_IN, "g_ptr": "*fp32", "dt_ptr": "*fp32", "N": "i32", "g_stride": "i32", **_SCALARS},
        _CONFIG,
        WARPS,
        3,
    ),
]
