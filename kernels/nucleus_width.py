"""The hinge without labels: its expectation over targets that the model itself would draw.

    z = softcap·tanh(scale·x / softcap)                     (no softcap: z = scale·x)
    p = softmax(z),  gap_i = max z − z_i,  T*_i = gap_i / (−ln p_min)
    r_i = [T*_i ≤ T_max]                                    or T*_i is clipped to T_max and r_i = 1
    ℓ = w·Σ_i p_i r_i (relu(T*_i − T) + λT)
    dℓ/dT = w·(λ Σ_i p_i r_i − Σ_i p_i r_i [T*_i > T])      λ·mass within reach − mass outside at T

One program a row, two reads of it: which tokens are outside depends on the row's maximum, so sums
over them cannot be carried while it grows. The first read carries the maximum and Σ e^{z−m}, a
partial sum a lane; the second, out of the cache, the sums over tokens by their T*. The slope
is made here, so the backward is one product a row. Rows of weight 0 are not read: 0 in both. Reads
2·N·V elements, writes 8 bytes a row.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device
from .extrema import at_most
from .lm_head_tiles import exp, transform

BLOCK = 4096  # 8 KB of bf16 a step: one 16-byte load a thread
WARPS = 16


@triton.jit
def _logits(p_x, o_v, V, scale, softcap, tail: tl.constexpr):
    """z of a block; −inf beyond V."""
    if tail:
        b_x = tl.load(p_x + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        # After the transform: softcap·tanh(−inf) is not −inf.
        b_z = tl.where(o_v < V, transform(b_x, scale, softcap), -float("inf"))
    else:
        b_z = transform(tl.load(p_x + o_v).to(tl.float32), scale, softcap)
    return b_z


@triton.jit
def _take_mass(b_z, m, b_s):
    """The maximum so far, and the lanes' Σ e^{z−m} for it."""
    new_m = tl.maximum(m, tl.max(b_z, 0))
    # Before the first finite logit sums are 0 and any finite shift will do.
    safe_m = tl.where(new_m == -float("inf"), 0.0, new_m)
    decay = tl.where(m == -float("inf"), 0.0, exp(m - safe_m))
    return new_m, b_s * decay + exp(b_z - safe_m)


@triton.jit
def _take_outside(b_z, m, inv, T, t_max, b_reach, b_mass, b_width, clip: tl.constexpr):
    """The lanes' Σ e^{z−m} over the tokens within reach, and over those outside the kept set
    Σ e^{z−m} and Σ e^{z−m}(T* − T)."""
    b_d = b_z - m
    b_required = -b_d * inv
    b_e = tl.where(b_z > -float("inf"), exp(b_d), 0.0)
    if clip:
        b_required = at_most(b_required, t_max)
    else:
        b_e = tl.where(b_required <= t_max, b_e, 0.0)
    # At −inf the product would be 0·inf.
    m_out = (b_required > T) & (b_e > 0)
    b_mass += tl.where(m_out, b_e, 0.0)
    b_width += tl.where(m_out, b_e * (b_required - T), 0.0)
    return b_reach + b_e, b_mass, b_width


@triton.jit(do_not_specialize=["N"])
def _nucleus_width(
    x_ptr,  # [N, V] any float, row stride `stride`
    t_ptr,  # [N] fp32
    w_ptr,  # [N] fp32, or None: 1
    out_ptr,  # [2, N] fp32, written: ℓ, dℓ/dT
    N,
    V,
    stride,
    inv,
    gravity,
    t_max,
    scale,
    softcap,
    clip: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + row * stride
    T = tl.load(t_ptr + row)
    w = tl.load(w_ptr + row) if w_ptr is not None else 1.0
    loss = 0.0
    slope = 0.0
    if w != 0:
        o_block = tl.arange(0, block)
        whole = V // block * block
        m = -float("inf")
        b_s = tl.zeros((block,), tl.float32)
        for start in range(0, whole, block):
            b_z = _logits(p_x, start + o_block, V, scale, softcap, False)
            m, b_s = _take_mass(b_z, m, b_s)
        if whole < V:
            b_z = _logits(p_x, whole + o_block, V, scale, softcap, True)
            m, b_s = _take_mass(b_z, m, b_s)
        s = tl.sum(b_s, 0)
        safe_m = tl.where(m == -float("inf"), 0.0, m)
        b_reach, b_mass = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
        b_width = tl.zeros((block,), tl.float32)
        for start in range(0, whole, block):
            b_z = _logits(p_x, start + o_block, V, scale, softcap, False)
            b_reach, b_mass, b_width = _take_outside(
                b_z, safe_m, inv, T, t_max, b_reach, b_mass, b_width, clip
            )
        if whole < V:
            b_z = _logits(p_x, whole + o_block, V, scale, softcap, True)
            b_reach, b_mass, b_width = _take_outside(
                b_z, safe_m, inv, T, t_max, b_reach, b_mass, b_width, clip
            )
        # s is 0 only where every logit is −inf: nothing is there then. A NaN or +inf makes it NaN.
        share = tl.where(s == 0, 0.0, 1.0 / s)
        pull = gravity * tl.sum(b_reach, 0) * share
        loss = w * (tl.sum(b_width, 0) * share + pull * T)
        slope = w * (pull - tl.sum(b_mass, 0) * share)
    tl.store(out_ptr + row, loss)
    tl.store(out_ptr + N + row, slope)


@on_its_device
def nucleus_width(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    max_temperature: float,
    clip: bool,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Launches one program a row.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32, unit stride along V.
        temperature, weight: `[N]` fp32, contiguous; no weight is 1.
        inv: `1 / (−ln p_min)`.
        clip: what to do with tokens whose T* is above `max_temperature`: clip it, or drop them.
        scale, softcap: the transform; `softcap=None` leaves it out.

    Returns:
        `[2, N]` fp32: each row's weighted loss, and its derivative by the temperature.
    """
    N, V = logits.shape
    out = torch.empty(2, N, dtype=torch.float32, device=logits.device)
    if N:
        _nucleus_width[(N,)](
            logits, temperature, weight, out, N, V, logits.stride(0), inv, gravity,
            max_temperature, float(scale), softcap, clip,
            min(BLOCK, max(16, triton.next_power_of_2(V))), num_warps=WARPS,
        )  # fmt: skip
    return out


_SIGNATURE = {
    **{"x_ptr": "*bf16", "t_ptr": "*fp32", "w_ptr": "*fp32", "out_ptr": "*fp32"},
    **{"N": "i32", "V": "i32", "stride": "i32", "inv": "fp32", "gravity": "fp32"},
    **{"t_max": "fp32", "scale": "fp32", "softcap": "fp32"},
}
AOT = [(_nucleus_width, _SIGNATURE, {"clip": False, "block": BLOCK}, WARPS, None)]
