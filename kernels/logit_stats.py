"""Row statistics of logits in one read.

    z = softcap·tanh(scale·x / softcap)          (no softcap: z = scale·x)
    m = max z        argmax, lowest id on ties   target = z[y]
    lse = m + log Σ e^{z−m}                      rank = |{i ≠ y: z_i > z_y}|
    entropy = log s − t/s,   s = Σ e^{z−m},  t = Σ e^{z−m}(z−m)

s and t are carried online, a partial sum a lane: when m grows by −d, s ← s·e^d and t ← e^d (t + d·s). One program a
row; ignored rows are not read and get 0 everywhere and rank −1. Reads N·V elements, writes 32 bytes a row.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # 8 KB of bf16 a step: one 16-byte load a thread
WARPS = 16


@triton.jit
def transform(b_x, scale, softcap, has_softcap: tl.constexpr):
    """Logits from the product: scale, then softcap. tanh(a) = a·(1 − a²/3 + 2a⁴/15) near 0, else from e^{−2|a|}."""
    b_z = b_x * scale
    if has_softcap:
        b_a = b_z / softcap
        b_q = b_a * b_a
        b_small = b_a * (1.0 + b_q * (-1 / 3 + b_q * (2 / 15 + b_q * (-17 / 315 + b_q * (62 / 2835)))))
        b_e = tl.exp(-2.0 * tl.abs(b_a))
        b_large = (1.0 - b_e) / (1.0 + b_e)
        b_large = tl.where(b_a < 0, -b_large, b_large)
        b_z = softcap * tl.where(tl.abs(b_a) < 0.2, b_small, b_large)
    return b_z


@triton.jit
def _step(
    b_x,
    o_v,
    V,
    y,
    z_y,
    m,
    best,
    b_s,
    b_t,
    b_rank,
    scale,
    softcap,
    has_softcap: tl.constexpr,
    tail: tl.constexpr,
):
    """Takes a block of raw logits into the row's (m, argmax) and the lanes' (s, t, rank), to be summed at the end."""
    b_z = transform(b_x.to(tl.float32), scale, softcap, has_softcap)
    if tail:
        b_z = tl.where(o_v < V, b_z, -float("inf"))  # after the transform: softcap·tanh(−inf) is not −inf
    block_max = tl.max(b_z, 0)
    if block_max > m:
        best = tl.min(tl.where(b_z == block_max, o_v, 2147483647), 0)
    new_m = tl.maximum(m, block_max)
    safe_m = tl.where(new_m == -float("inf"), 0.0, new_m)
    d = tl.where(m == -float("inf"), 0.0, m - safe_m)  # before the first finite logit s = t = 0: any finite d will do
    empty = b_z == -float("inf")
    b_d = tl.where(empty, 0.0, b_z - safe_m)  # 0·(−inf) must not reach t
    b_e = tl.where(empty, 0.0, tl.exp(b_d))
    decay = tl.exp(d)
    b_t = decay * (b_t + d * b_s) + b_e * b_d
    b_s = decay * b_s + b_e
    b_rank += ((b_z > z_y) & (o_v != y)).to(tl.int32)
    return new_m, best, b_s, b_t, b_rank


@triton.jit
def _logit_stats(
    x_ptr,  # [N, V] any float, row stride `stride`
    y_ptr,  # [N] i64
    max_ptr,  # [N] fp32, written
    argmax_ptr,  # [N] i64, written
    target_ptr,  # [N] fp32, written
    lse_ptr,  # [N] fp32, written
    rank_ptr,  # [N] i64, written
    entropy_ptr,  # [N] fp32, written
    V,
    stride,
    scale,
    softcap,
    ignore: tl.constexpr,
    has_softcap: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + row * stride
    y = tl.load(y_ptr + row)
    m = -float("inf")
    best = 0
    b_s = tl.zeros((block,), tl.float32)
    b_t = tl.zeros((block,), tl.float32)
    b_rank = tl.zeros((block,), tl.int32)
    z_y = 0.0
    valid = y != ignore
    if valid:
        z_y = transform(tl.load(p_x + y).to(tl.float32), scale, softcap, has_softcap)
        column = y.to(tl.int32)
        o_block = tl.arange(0, block)
        whole = V // block * block
        for start in range(0, whole, block):
            o_v = start + o_block
            b_x = tl.load(p_x + o_v)
            m, best, b_s, b_t, b_rank = _step(
                b_x, o_v, V, column, z_y, m, best, b_s, b_t, b_rank, scale, softcap, has_softcap, False
            )
        if whole < V:
            o_v = whole + o_block
            b_x = tl.load(p_x + o_v, mask=o_v < V, other=0.0)
            m, best, b_s, b_t, b_rank = _step(
                b_x, o_v, V, column, z_y, m, best, b_s, b_t, b_rank, scale, softcap, has_softcap, True
            )
    s = tl.sum(b_s, 0)
    t = tl.sum(b_t, 0)
    rank = tl.sum(b_rank, 0)
    safe_s = tl.where(s > 0, s, 1.0)
    tl.store(max_ptr + row, tl.where(valid, m, 0.0))
    tl.store(argmax_ptr + row, tl.where(valid, best, 0).to(tl.int64))
    tl.store(target_ptr + row, z_y)
    tl.store(lse_ptr + row, tl.where(valid, m + tl.log(safe_s), 0.0))
    tl.store(rank_ptr + row, tl.where(valid, rank, -1).to(tl.int64))
    tl.store(entropy_ptr + row, tl.where(valid, tl.maximum(tl.log(safe_s) - t / safe_s, 0.0), 0.0))


def logit_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, ...]:
    """Launches one program a row.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32, unit stride along V.
        target: `[N]` int64 ids in `[0, V)`, or `ignore_index`.
        logit_scale, softcap: the transform; `softcap=None` leaves it out.

    Returns:
        max_logit fp32, argmax int64, target_logit fp32, logsumexp fp32, rank int64, entropy fp32 (nats), each `[N]`.
    """
    N, V = logits.shape
    kinds = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.float32)
    out = tuple(torch.empty(N, dtype=kind, device=logits.device) for kind in kinds)
    if N:
        _logit_stats[(N,)](
            logits, target, *out, V, logits.stride(0), float(logit_scale), float(softcap or 1.0),
            ignore_index, softcap is not None, min(BLOCK, max(16, triton.next_power_of_2(V))), num_warps=WARPS,
        )  # fmt: skip
    return out


AOT = [
    (
        _logit_stats,
        {
            "x_ptr": "*bf16", "y_ptr": "*i64", "max_ptr": "*fp32", "argmax_ptr": "*i64", "target_ptr": "*fp32",
            "lse_ptr": "*fp32", "rank_ptr": "*i64", "entropy_ptr": "*fp32", "V": "i32", "stride": "i32",
            "scale": "fp32", "softcap": "fp32",
        },
        {"ignore": -100, "has_softcap": True, "block": BLOCK},
        WARPS,
        3,
    ),
]  # fmt: skip
