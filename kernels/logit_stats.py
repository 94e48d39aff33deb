"""Row statistics of logits in one read: of a rank's columns of the vocabulary, or of all of them.

    z = softcap·tanh(scale·x / softcap)                     (no softcap: z = scale·x)
    m = max z,  argmax: lowest id on ties
    count = |{i ≠ y: z_i > threshold}|,  threshold = z_y unless given
    s = Σ e^{z−m},  t = Σ e^{z−m}(z−m)
    with temperatures, for x = (z − m)/T:  Σ e^x,  Σ e^x x,  Σ e^x x²
    cut: these three over {i: z_i > threshold} alone, and s = t = 0: sums of a kept set

Sums are carried online, a partial sum a lane: when m grows by −d, s ← e^d s, t ← e^d (t + d s),
q ← e^d (q + 2 d t + d² s). One program a row; ignored rows are not read: 0 everywhere, count −1.
Reads N·V elements, writes 32 or 44 bytes a row. `autodeco_fast/stats.py` makes logsumexp, rank,
entropy and moments of it.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device
from .lm_head_tiles import transform

BLOCK = 4096  # 8 KB of bf16 a step: one 16-byte load a thread
WARPS = 16
IGNORED = tl.constexpr(-2)


@triton.jit
def moved(d, b_s, b_t, b_q):
    """Sums of x⁰, x¹ and x² after x grew by d."""
    decay = tl.exp(d)
    return decay * b_s, decay * (b_t + d * b_s), decay * (b_q + d * (2.0 * b_t + d * b_s))


@triton.jit
def _step(
    b_z, o_v, column, threshold, inverse, m, best, b_s, b_t, b_rank, b_u, b_a, b_q, V,
    tail: tl.constexpr, scaled: tl.constexpr, cut: tl.constexpr,
):  # fmt: skip
    """Takes a block of logits into the row's (m, argmax) and the lanes' sums."""
    if tail:
        # After the transform: softcap·tanh(−inf) is not −inf.
        b_z = tl.where(o_v < V, b_z, -float("inf"))
    block_max = tl.max(b_z, 0)
    if block_max > m:
        best = tl.min(tl.where(b_z == block_max, o_v, 2147483647), 0)
    new_m = tl.maximum(m, block_max)
    safe_m = tl.where(new_m == -float("inf"), 0.0, new_m)
    # Before the first finite logit all sums are 0: any finite d will do.
    d = tl.where(m == -float("inf"), 0.0, m - safe_m)
    empty = b_z == -float("inf")
    b_d = tl.where(empty, 0.0, b_z - safe_m)  # 0·(−inf) must not reach a sum
    above = b_z > threshold
    if not cut:
        b_e = tl.where(empty, 0.0, tl.exp(b_d))
        b_s, b_t, _ = moved(d, b_s, b_t, 0.0)
        b_s += b_e
        b_t += b_e * b_d
    if scaled:
        b_x = b_d * inverse
        if cut:
            b_e = tl.where(above, tl.exp(b_x), 0.0)
        else:
            b_e = tl.where(empty, 0.0, tl.exp(b_x))
        b_u, b_a, b_q = moved(d * inverse, b_u, b_a, b_q)
        b_u += b_e
        b_a += b_e * b_x
        b_q += b_e * b_x * b_x
    b_rank += (above & (o_v != column)).to(tl.int32)
    return new_m, best, b_s, b_t, b_rank, b_u, b_a, b_q


@triton.jit
def _logit_stats(
    x_ptr,  # [N, V] any float, row stride `stride`
    column_ptr,  # [N] i64: the target's column, −1 if another part has it, −2 if the row is ignored
    threshold_ptr,  # [N] fp32, or None: the target's logit, which then is here
    inverse_ptr,  # [N] fp32: 1/T, or None
    float_ptr,  # [4 or 7, N] fp32, written
    int_ptr,  # [2, N] i64, written
    N,
    V,
    stride,
    scale,
    softcap,
    cut: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + row * stride
    column = tl.load(column_ptr + row).to(tl.int32)
    scaled: tl.constexpr = inverse_ptr is not None
    inverse = tl.load(inverse_ptr + row) if inverse_ptr is not None else 1.0
    m = -float("inf")
    best = 0
    z_y = -float("inf")
    b_zero = tl.zeros((block,), tl.float32)
    b_s, b_t, b_u, b_a, b_q = b_zero, b_zero, b_zero, b_zero, b_zero
    b_rank = tl.zeros((block,), tl.int32)
    valid = column != IGNORED
    if valid:
        if column >= 0:
            z_y = transform(tl.load(p_x + column).to(tl.float32), scale, softcap)
        threshold = tl.load(threshold_ptr + row) if threshold_ptr is not None else z_y
        o_block = tl.arange(0, block)
        whole = V // block * block
        for start in range(0, whole, block):
            o_v = start + o_block
            b_z = transform(tl.load(p_x + o_v).to(tl.float32), scale, softcap)
            m, best, b_s, b_t, b_rank, b_u, b_a, b_q = _step(
                b_z, o_v, column, threshold, inverse, m, best, b_s, b_t, b_rank, b_u, b_a, b_q,
                V, False, scaled, cut,
            )  # fmt: skip
        if whole < V:
            o_v = whole + o_block
            b_z = transform(
                tl.load(p_x + o_v, mask=o_v < V, other=0.0).to(tl.float32), scale, softcap
            )
            m, best, b_s, b_t, b_rank, b_u, b_a, b_q = _step(
                b_z, o_v, column, threshold, inverse, m, best, b_s, b_t, b_rank, b_u, b_a, b_q,
                V, True, scaled, cut,
            )  # fmt: skip
    tl.store(float_ptr + row, tl.where(valid, m, 0.0))
    tl.store(float_ptr + N + row, tl.where(valid, z_y, 0.0))
    tl.store(float_ptr + 2 * N + row, tl.sum(b_s, 0))
    tl.store(float_ptr + 3 * N + row, tl.sum(b_t, 0))
    if scaled:
        tl.store(float_ptr + 4 * N + row, tl.sum(b_u, 0))
        tl.store(float_ptr + 5 * N + row, tl.sum(b_a, 0))
        tl.store(float_ptr + 6 * N + row, tl.sum(b_q, 0))
    tl.store(int_ptr + row, tl.where(valid, best, 0).to(tl.int64))
    tl.store(int_ptr + N + row, tl.where(valid, tl.sum(b_rank, 0), -1).to(tl.int64))


@on_its_device
def logit_stats(
    logits: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    cut: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches one program a row.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32, unit stride along V.
        column: `[N]` int64: the target's column in `[0, V)`, −1 if another rank has it,
            −2 in ignored rows.
        threshold: `[N]` fp32 that ranks count against, or None for the target's logit (then no
            column is −1).
        inverse_temperature: `[N]` fp32 or None.
        scale, softcap: the transform; `softcap=None` leaves it out.
        cut: whether the sums at a temperature are those of logits above the threshold; the others
            are 0 then.

    Returns:
        floats `[4 or 7, N]` fp32 and ints `[2, N]` int64, as in `autodeco_fast/stats.py`.
    """
    N, V = logits.shape
    floats = torch.empty(
        4 if inverse_temperature is None else 7, N, dtype=torch.float32, device=logits.device
    )
    ints = torch.empty(2, N, dtype=torch.int64, device=logits.device)
    if N:
        _logit_stats[(N,)](
            logits, column, threshold, inverse_temperature, floats, ints, N, V, logits.stride(0),
            float(scale), softcap, cut, min(BLOCK, max(16, triton.next_power_of_2(V))),
            num_warps=WARPS,
        )  # fmt: skip
    return floats, ints


_SIGNATURE = {
    **{"x_ptr": "*bf16", "column_ptr": "*i64", "float_ptr": "*fp32", "int_ptr": "*i64"},
    **{"N": "i32", "V": "i32", "stride": "i32", "scale": "fp32", "softcap": "fp32"},
}
_SCALED = {**_SIGNATURE, "inverse_ptr": "*fp32"}
_PLAIN = {"threshold_ptr": None, "cut": False, "block": BLOCK}
AOT = [
    (_logit_stats, _SIGNATURE, {**_PLAIN, "inverse_ptr": None}, WARPS, 3),
    (_logit_stats, _SCALED, _PLAIN, WARPS, 3),
    (_logit_stats, {**_SCALED, "threshold_ptr": "*fp32"}, {"cut": True, "block": BLOCK}, WARPS, 3),
]
