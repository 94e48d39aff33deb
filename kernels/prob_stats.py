"""What AutoDeco's top-p head sees of a distribution: four numbers a row.

    p = softmax(z / (T + 1e-8)):   max p,   −Σ p ln(p + 1e-8),
                                   Σ (p − 1/V)² / (V − 1),   sum of the five largest p
    z = softcap·tanh(scale·x / softcap)          (no softcap: z = scale·x)

One program a row, two reads of it: ln(p + 1e-8) needs Σ e^z first, and leaving the 1e-8 out would
change the entropy by up to V·1e-8 nats. The first read carries the maximum, the sum and the five
largest, which are looked for only in blocks whose maximum is above the fifth so far. Writes 16
bytes a row.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device
from .lm_head_tiles import exp, transform
from .nucleus_width import BLOCK, WARPS

EPSILON = tl.constexpr(1e-8)


@triton.jit
def _logits(p_x, o_v, V, inverse, scale, softcap):
    """z/T of a block; −inf beyond V."""
    b_z = (
        transform(tl.load(p_x + o_v, mask=o_v < V, other=0.0).to(tl.float32), scale, softcap)
        * inverse
    )
    return tl.where(o_v < V, b_z, -float("inf"))


@triton.jit(do_not_specialize=["N"])
def _prob_stats(
    x_ptr,  # [N, V] any float, row stride `stride`
    temperature_ptr,  # [N] fp32
    out_ptr,  # [4, N] fp32, written: max, entropy, variance, top 5
    N,
    V,
    stride,
    scale,
    softcap,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + row * stride
    inverse = 1.0 / (tl.load(temperature_ptr + row) + EPSILON)
    o_block = tl.arange(0, block)
    m = -float("inf")
    second, third, fourth, fifth = m, m, m, m  # the first is m
    b_s = tl.zeros((block,), tl.float32)
    for start in range(0, V, block):
        b_x = _logits(p_x, start + o_block, V, inverse, scale, softcap)
        top = tl.max(b_x, 0)
        new_m = tl.maximum(m, top)
        safe = tl.where(new_m == -float("inf"), 0.0, new_m)
        b_s = b_s * tl.where(m == -float("inf"), 0.0, exp(m - safe)) + exp(b_x - safe)
        while top > fifth:
            at = tl.min(tl.where(b_x == top, o_block, block), 0)
            b_x = tl.where(o_block == at, -float("inf"), b_x)
            first = tl.maximum(m, top)
            low = tl.minimum(m, top)
            m = first
            top = tl.minimum(second, low)
            second = tl.maximum(second, low)
            low = tl.minimum(third, top)
            third = tl.maximum(third, top)
            top = tl.minimum(fourth, low)
            fourth = tl.maximum(fourth, low)
            fifth = tl.maximum(fifth, top)
            top = tl.max(b_x, 0)
    safe = tl.where(m == -float("inf"), 0.0, m)
    s = tl.sum(b_s, 0)
    scale_p = 1.0 / s  # NaN in all four where a logit is, or all are −inf
    uniform = 1.0 / V
    b_h = tl.zeros((block,), tl.float32)
    b_v = tl.zeros((block,), tl.float32)
    for start in range(0, V, block):
        o_v = start + o_block
        b_p = exp(_logits(p_x, o_v, V, inverse, scale, softcap) - safe) * scale_p
        b_h += b_p * tl.log(b_p + EPSILON)
        b_c = tl.where(o_v < V, b_p - uniform, 0.0)
        b_v += b_c * b_c
    mass = (
        exp(m - safe)
        + exp(second - safe)
        + exp(third - safe)
        + exp(fourth - safe)
        + exp(fifth - safe)
    )
    tl.store(out_ptr + row, exp(m - safe) * scale_p)
    tl.store(out_ptr + N + row, -tl.sum(b_h, 0))
    tl.store(out_ptr + 2 * N + row, tl.sum(b_v, 0) / tl.maximum(V - 1, 1))
    tl.store(out_ptr + 3 * N + row, mass * scale_p)


@on_its_device
def prob_stats(
    logits: torch.Tensor, temperature: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Launches one program a row.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32, unit stride along V.
        temperature: `[N]` fp32.
        scale, softcap: the transform; `softcap=None` leaves it out.

    Returns:
        `[4, N]` fp32: largest probability, entropy (nats), unbiased variance over the vocabulary,
        mass of the five largest.
    """
    N, V = logits.shape
    out = torch.empty(4, N, dtype=torch.float32, device=logits.device)
    if N:
        block = min(BLOCK, max(16, triton.next_power_of_2(V)))
        _prob_stats[(N,)](
            logits, temperature, out, N, V, logits.stride(0), float(scale), softcap, block,
            num_warps=WARPS,
        )  # fmt: skip
    return out


_SIGNATURE = {
    **{"x_ptr": "*bf16", "temperature_ptr": "*fp32", "out_ptr": "*fp32"},
    **{"N": "i32", "V": "i32", "stride": "i32", "scale": "fp32", "softcap": "fp32"},
}
AOT = [(_prob_stats, _SIGNATURE, {"block": BLOCK}, WARPS, None)]
