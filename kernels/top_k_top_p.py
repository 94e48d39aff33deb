"""Top-k and top-p as one threshold a row, without a sort.

    floor = max(τ_k, τ_p)      τ_k = the k-th largest logit
                               τ_p = min {v : Σ_{z_i > v} p_i < top_p · Σ_{z_i ≥ τ_k} p_i}

with p ∝ e^{z/T}: temperature, then top-k, then top-p, as transformers applies them. Both are
functions of a value, so ties stand or fall together. A bisection over the bit patterns of fp32, in
their order, finds each value exactly in at most 32 counts, and a count reads only those sub-tiles
whose maximum reaches the value tried. Two bounds start it close:

    τ_k ≥ the k-th largest of the sub-tiles' maxima
    τ_p ≥ max z + T·ln((1 − top_p)/V)                  (all below weigh ≤ 1 − top_p)

One program a row; sums in a fixed order.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.sampling import SamplingParameters

from .device import on_its_device
from .logit_tiles import LOWEST, SUBTILE, finite, load_tile, row_maximum
from .row_parameters import GREEDY_BELOW, row_value, tensors_and_numbers

MOST = tl.constexpr(2147483647)
TINY = tl.constexpr(1.1754943508222875e-38)
GROUP = tl.constexpr(64)  # sub-tiles whose maxima are looked at together


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
    z_ptr, allowed_ptr, max_ptr, row, v, m, divisor, V, stride, words, n,
    subtile: tl.constexpr, strict: tl.constexpr,
):  # fmt: skip
    """How many logits are ≥ v (> v if strict), and Σ e^{(z − m)/T} over them."""
    count = 0
    mass = 0.0
    for first in range(0, n, GROUP):
        o_n = first + tl.arange(0, GROUP)
        b_top = tl.load(max_ptr + row * n + o_n, mask=o_n < n, other=-float("inf"))
        b_reach = (b_top >= v) & (o_n < n)
        tile = tl.min(tl.where(b_reach, o_n, n), 0)
        while tile < n:
            b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, subtile)
            b_z = finite(b_z)
            b_in = b_z > v if strict else b_z >= v
            count += tl.sum(b_in.to(tl.int32), 0)
            mass += tl.sum(tl.where(b_in, tl.exp((b_z - m) / divisor), 0.0), 0)
            tile = tl.min(tl.where(b_reach & (o_n > tile), o_n, n), 0)
    return count, mass


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "n"])
def _threshold(
    z_ptr,  # [B, V] any float, row stride `stride`
    allowed_ptr,  # [B, words] i32 bits, or None
    max_ptr,  # [B, n] fp32: maxima of sub-tiles; +inf where one holds NaN or +inf
    temperature_ptr,  # [B] fp32 or None, as the next two
    top_k_ptr,  # [B] i64; 0 is off
    top_p_ptr,  # [B] fp32; 1 is off
    floor_ptr,  # [B] fp32, written; −inf: nothing is cut, +inf: k or p is NaN or out of range
    V,
    stride,
    words,
    n,
    temperature,
    top_k,
    top_p,
    subtile: tl.constexpr,
    block_n: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.maximum(row_value(temperature_ptr, temperature, row, tl.float32), GREEDY_BELOW)
    k = row_value(top_k_ptr, top_k, row, tl.int64)
    p = row_value(top_p_ptr, top_p, row, tl.float32)
    o_n = tl.arange(0, block_n)
    b_max, m, _ = row_maximum(
        z_ptr, allowed_ptr, max_ptr, row, V, stride, words, n, subtile, block_n
    )
    floor = -float("inf")
    if m > -float("inf"):
        high = _key(m)
        if k > 0:
            b_sorted = tl.sort(b_max, descending=True)
            low = _key(tl.maximum(tl.max(tl.where(o_n == k - 1, b_sorted, LOWEST), 0), LOWEST))
            count, _ = _above(
                z_ptr, allowed_ptr, max_ptr, row, _value(low), m, divisor, V, stride, words, n,
                subtile, False,
            )  # fmt: skip
            if count >= k:
                while low < high:  # #{z ≥ low} ≥ k
                    middle = (low + high + 1) >> 1
                    count, _ = _above(
                        z_ptr, allowed_ptr, max_ptr, row, _value(middle), m, divisor, V, stride,
                        words, n, subtile, False,
                    )  # fmt: skip
                    enough = count >= k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle - 1)
                floor = _value(low)
        if p < 1:
            # A little lower than the bound: it is only where the search begins.
            reach = m + divisor * tl.log((1 - p) / V) * 1.0001 - 1e-3
            low = _key(tl.maximum(tl.maximum(reach, floor), LOWEST))
            _, total = _above(
                z_ptr, allowed_ptr, max_ptr, row, tl.maximum(floor, LOWEST), m, divisor, V, stride,
                words, n, subtile, False,
            )  # fmt: skip
            high = _key(m)
            while low < high:  # Σ_{z > high} < p·total
                middle = (low + high) >> 1
                _, mass = _above(
                    z_ptr, allowed_ptr, max_ptr, row, _value(middle), m, divisor, V, stride, words,
                    n, subtile, True,
                )  # fmt: skip
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
    parameters: SamplingParameters,
    *,
    allowed: torch.Tensor | None = None,
    tile: int = SUBTILE,
) -> torch.Tensor:
    """The lowest logit that top-k and top-p keep, `[B]` fp32.

    −inf where both are off or fewer than k are finite; +inf, which no token reaches, where one is
    NaN or out of range.

    Args:
        logits: `[B, V]` any float, unit stride along V.
        maxima: `[B, ⌈V/tile⌉]` fp32 of a row's sub-tiles, +inf where one holds NaN or +inf.
        parameters: of the rows.
        allowed: `[B, ⌈V/32⌉]` int32 bits.
        tile: logits of a sub-tile.
    """
    B, V = logits.shape
    n = maxima.shape[1]
    floor = torch.empty(B, dtype=torch.float32, device=logits.device)
    if B == 0:
        return floor
    p = parameters
    tensors, numbers = tensors_and_numbers(p.temperature, p.top_k, p.top_p)
    words = 0 if allowed is None else allowed.stride(0)
    block_n = max(16, triton.next_power_of_2(n))
    _threshold[(B,)](
        logits, allowed, maxima, *tensors, floor,
        V, logits.stride(0), words, n, *numbers, tile, block_n,
    )  # fmt: skip
    return floor


_SIGNATURE = {
    **{"z_ptr": "*bf16", "allowed_ptr": "*i32", "max_ptr": "*fp32", "temperature_ptr": "*fp32"},
    **{"top_k_ptr": "*i64", "top_p_ptr": "*fp32", "floor_ptr": "*fp32"},
    **dict.fromkeys(("V", "stride", "words", "n"), "i32"),
    **{"temperature": "fp32", "top_k": "i64", "top_p": "fp32"},
}
AOT = [(_threshold, _SIGNATURE, {"subtile": SUBTILE, "block_n": 1024}, 4, 3)]
