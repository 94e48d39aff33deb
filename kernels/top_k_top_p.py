"""Top-k and top-p as one threshold a row, without a sort.

    floor = max(τ_k, τ_p)      τ_k = the k-th largest logit      τ_p = min {v : Σ_{z_i > v} p_i < top_p · Σ_{z_i ≥ τ_k} p_i}

with p ∝ e^{z/T}: temperature, then top-k, then top-p, as transformers applies them. Both are
functions of a value, so ties stand or fall together. A bisection over the bit patterns of fp32, in
their order, finds each value exactly in at most 32 counts, and a count reads only those splits
whose maximum reaches the value tried. Two bounds start it close:

    τ_k ≥ the k-th largest of the splits' maxima        τ_p ≥ max z + T·ln((1 − top_p)/V)    (all below weigh ≤ 1 − top_p)

One program a row; sums in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device
from .rows import GREEDY_BELOW, LOWEST, TILE, finite, load_tile, row_or_number, row_value

MOST = tl.constexpr(2147483647)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _key(value):
    """fp32 → an integer in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(key):
    """The fp32 of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _above(
    z_ptr,
    allowed_ptr,
    m_ptr,
    row,
    v,
    m,
    heat,
    V,
    stride,
    words,
    S,
    depth,
    block: tl.constexpr,
    strict: tl.constexpr,
):
    """How many logits are ≥ v (> v if strict), and Σ e^{(z − m)/T} over them."""
    count = 0
    mass = 0.0
    for split in range(0, S):
        if tl.load(m_ptr + row * S + split) >= v:
            for tile in range(split * depth, tl.minimum((split + 1) * depth, tl.cdiv(V, block))):
                b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
                b_z = finite(b_z)
                b_in = b_z > v if strict else b_z >= v
                count += tl.sum(b_in.to(tl.int32), 0)
                mass += tl.sum(tl.where(b_in, tl.exp((b_z - m) / heat), 0.0), 0)
    return count, mass


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "S", "depth"])
def _threshold(
    z_ptr,  # [B, V] any float, row stride `stride`
    allowed_ptr,  # [B, words] i32 bits, or None
    m_ptr,  # [B, S] fp32: the splits' maxima
    temperature_ptr,  # [B] fp32 or None, as the next two
    top_k_ptr,  # [B] i64; 0 is off
    top_p_ptr,  # [B] fp32; 1 is off
    floor_ptr,  # [B] fp32, written; −inf where nothing is cut, +inf where k or p is NaN or out of range
    V,
    stride,
    words,
    S,
    depth,
    temperature,
    top_k,
    top_p,
    block: tl.constexpr,
    block_s: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heat = tl.maximum(row_value(temperature_ptr, temperature, row, tl.float32), GREEDY_BELOW)
    k = row_value(top_k_ptr, top_k, row, tl.int64)
    p = row_value(top_p_ptr, top_p, row, tl.float32)
    o_s = tl.arange(0, block_s)
    b_max = tl.load(m_ptr + row * S + o_s, mask=o_s < S, other=-float("inf"))
    m = tl.max(b_max, 0)
    floor = -float("inf")
    if m > -float("inf"):
        high = _key(m)
        if k > 0:
            b_sorted = tl.sort(b_max, descending=True)
            low = _key(tl.maximum(tl.max(tl.where(o_s == k - 1, b_sorted, LOWEST), 0), LOWEST))
            n, _ = _above(
                z_ptr,
                allowed_ptr,
                m_ptr,
                row,
                _value(low),
                m,
                heat,
                V,
                stride,
                words,
                S,
                depth,
                block,
                False,
            )
            if n >= k:
                while low < high:  # #{z ≥ low} ≥ k
                    middle = (low + high + 1) >> 1
                    n, _ = _above(
                        z_ptr,
                        allowed_ptr,
                        m_ptr,
                        row,
                        _value(middle),
                        m,
                        heat,
                        V,
                        stride,
                        words,
                        S,
                        depth,
                        block,
                        False,
                    )
                    enough = n >= k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle - 1)
                floor = _value(low)
        if p < 1:
            reach = (
                m + heat * tl.log((1 - p) / V) * 1.0001 - 1e-3
            )  # a little lower: it is only where the search begins
            low = _key(tl.maximum(tl.maximum(reach, floor), LOWEST))
            _, total = _above(
                z_ptr,
                allowed_ptr,
                m_ptr,
                row,
                tl.maximum(floor, LOWEST),
                m,
                heat,
                V,
                stride,
                words,
                S,
                depth,
                block,
                False,
            )
            high = _key(m)
            while low < high:  # Σ_{z > high} < p·total
                middle = (low + high) >> 1
                _, mass = _above(
                    z_ptr,
                    allowed_ptr,
                    m_ptr,
                    row,
                    _value(middle),
                    m,
                    heat,
                    V,
                    stride,
                    words,
                    S,
                    depth,
                    block,
                    True,
                )
                small = mass < p * total
                high = tl.where(small, middle, high)
                low = tl.where(small, low, middle + 1)
            floor = _value(high)
    right = (k >= 0) & (k <= MOST) & (p >= TINY) & (p <= 1)
    tl.store(floor_ptr + row, tl.where(right, floor, float("inf")))


@on_its_device
def top_k_top_p(
    logits: torch.Tensor,
    maxima: torch.Tensor,
    depth: int,
    temperature: torch.Tensor | float,
    top_k: torch.Tensor | int,
    top_p: torch.Tensor | float,
    *,
    allowed: torch.Tensor | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """The lowest logit that top-k and top-p keep, `[B]` fp32; −inf where both are off or fewer than
    k are finite; +inf, which no token reaches, where one is NaN or out of range.

    Args:
        logits: `[B, V]` any float, unit stride along V.
        maxima: `[B, S]` fp32 of splits of `depth` tiles of `tile` logits.
        temperature, top_p: `[B]` fp32 or a number; top_p 1 is off.
        top_k: `[B]` int64 or a number; 0 is off.
        allowed: `[B, ⌈V/32⌉]` int32 bits.
    """
    B, V = logits.shape
    S = maxima.shape[1]
    floor = torch.empty(B, dtype=torch.float32, device=logits.device)
    if B == 0:
        return floor
    rows, numbers = zip(*map(row_or_number, (temperature, top_k, top_p)))
    words = 0 if allowed is None else allowed.stride(0)
    block_s = max(16, triton.next_power_of_2(S))
    sizes = V, logits.stride(0), words, S, depth
    _threshold[(B,)](logits, allowed, maxima, *rows, floor, *sizes, *numbers, tile, block_s)
    return floor


AOT = [
    (_threshold, {"z_ptr": "*bf16", "allowed_ptr": "*i32", "m_ptr": "*fp32", "temperature_ptr": "*fp32", "top_k_ptr": "*i64",
                  "top_p_ptr": "*fp32", "floor_ptr": "*fp32", "temperature": "fp32", "top_k": "i64", "top_p": "fp32",
                  **dict.fromkeys(("V", "stride", "words", "S", "depth"), "i32")},
     {"block": TILE, "block_s": 256}, 4, 3),
]  # fmt: skip
