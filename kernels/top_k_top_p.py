"""Top-k and top-p as one threshold a row, without a sort.

    floor = max(τ_k, τ_p)      τ_k = the largest v with #{z ≥ v} ≥ k, the k-th largest logit
                               τ_p = the largest v with Σ_{z ≥ v} p_i ≥ top_p · Σ_{z ≥ τ_k} p_i

with p ∝ e^{z/T}: temperature, then top-k, then top-p, as transformers applies them. Both are
functions of a value, so ties stand or fall together, and both are the largest value at which a
falling sum still reaches what is wanted. fp32 has 2³² values; their bit patterns in their order are
the keys of a search:

    1. It starts close: τ_k ≥ the k-th largest of the sub-tiles' maxima, and
       τ_p ≥ max z + T·ln((1 − top_p)/V), below which all weighs ≤ 1 − top_p.
    2. While more than 1,024 logits lie between its ends, one read sums at eight keys between them;
       a read is of those sub-tiles whose maximum reaches the lower end. Eleven such reads come down
       to one key, whatever the logits.
    3. The logits between the ends are written one behind the other, and the rest is a bisection in
       registers.

One program a row; sums in a fixed order.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.sampling import SUBTILE, SamplingParameters, tensors_and_numbers

from .dependent_launch import TARGETS, dependent, lets_next_start, options, waits
from .device import on_its_device
from .logit_tiles import LOWEST, finite, load_tile, next_reaching, reaching, row_maximum
from .row_parameters import GREEDY_BELOW, row_value

MOST = tl.constexpr(2147483647)
TINY = tl.constexpr(1.1754943508222875e-38)
GROUP = tl.constexpr(64)  # sub-tiles whose maxima are looked at together
CANDIDATES = tl.constexpr(1024)  # logits that a bisection in registers looks at
WARPS = 8  # with 4 it spills, and with sixteen keys on some targets
WAYS = 8  # keys at which one read of the logits sums


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
def _sums(
    z_ptr, allowed_ptr, max_ptr, row, b_v, m, divisor, V, stride, words, n,
    subtile: tl.constexpr, ways: tl.constexpr,
):  # fmt: skip
    """How many logits are ≥ each of the values `[ways]`, and Σ e^{(z − m)/T} over them."""
    b_count = tl.zeros([ways], tl.int32)
    b_mass = tl.zeros([ways], tl.float32)
    least = tl.min(b_v, 0)
    for first in range(0, n, GROUP):
        o_n, b_reach = reaching(max_ptr, row, first, n, least, GROUP)
        tile = next_reaching(o_n, b_reach, -1, n)
        while tile < n:
            b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, subtile)
            b_z = finite(b_z)[:, None]
            b_in = b_z >= b_v[None, :]
            b_count += tl.sum(b_in.to(tl.int32), 0)
            b_mass += tl.sum(tl.where(b_in, tl.exp((b_z - m) / divisor), 0.0), 0)
            tile = next_reaching(o_n, b_reach, tile, n)
    return b_count, b_mass


@triton.jit
def _sum(
    z_ptr, allowed_ptr, max_ptr, row, v, m, divisor, V, stride, words, n, subtile: tl.constexpr
):  # fmt: skip
    """`_sums` at one value."""
    b_count, b_mass = _sums(
        z_ptr, allowed_ptr, max_ptr, row, tl.zeros([1], tl.float32) + v, m, divisor, V, stride,
        words, n, subtile, 1,
    )  # fmt: skip
    return tl.sum(b_count, 0), tl.sum(b_mass, 0)


@triton.jit
def _gather(
    z_ptr, allowed_ptr, max_ptr, found_ptr, row, low, end, V, stride, words, n,
    subtile: tl.constexpr,
):  # fmt: skip
    """The logits in [low, end) of a row, at most CANDIDATES, and −inf behind them."""
    p = found_ptr + row * CANDIDATES
    size = 0
    for first in range(0, n, GROUP):
        o_n, b_reach = reaching(max_ptr, row, first, n, low, GROUP)
        tile = next_reaching(o_n, b_reach, -1, n)
        while tile < n:
            b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, subtile)
            b_z = finite(b_z)
            b_in = (b_z >= low) & (b_z < end)
            b_at = size + tl.cumsum(b_in.to(tl.int32), 0) - 1
            tl.store(p + b_at, b_z, mask=b_in & (b_at < CANDIDATES))
            size += tl.sum(b_in.to(tl.int32), 0)
            tile = next_reaching(o_n, b_reach, tile, n)
    tl.debug_barrier()  # other threads read what these have written
    o_c = tl.arange(0, CANDIDATES)
    return tl.load(p + o_c, mask=o_c < size, other=-float("inf"))


@triton.jit
def _largest(
    z_ptr, allowed_ptr, max_ptr, found_ptr, row, low, high, count, wanted, m, divisor, V, stride,
    words, n, subtile: tl.constexpr, ways: tl.constexpr, weighted: tl.constexpr,
):  # fmt: skip
    """The largest of the keys low … high at which the number of logits (weighted: Σ e^{(z − m)/T})
    still is `wanted`; of `low`, which `count` logits reach, that is known."""
    beyond = 0  # logits above `high`
    total = 0.0 if weighted else 0  # their sum
    o_w = tl.arange(0, ways).to(tl.int64)
    while (count - beyond > CANDIDATES) & (low < high):
        b_key = low + (high - low) * (o_w + 1) // ways  # the last is `high`
        b_count, b_mass = _sums(
            z_ptr, allowed_ptr, max_ptr, row, _value(b_key), m, divisor, V, stride, words, n,
            subtile, ways,
        )  # fmt: skip
        b_sum = b_mass if weighted else b_count
        b_enough = b_sum >= wanted
        count = tl.min(tl.where(b_enough, b_count, count), 0)
        beyond = tl.max(tl.where(b_enough, beyond, b_count), 0)
        total = tl.max(tl.where(b_enough, total, b_sum), 0)
        low = tl.max(tl.where(b_enough, b_key, low), 0)
        high = tl.min(tl.where(b_enough, high, b_key - 1), 0)
    if low < high:
        b_z = _gather(
            z_ptr, allowed_ptr, max_ptr, found_ptr, row, _value(low), _value(high + 1), V, stride,
            words, n, subtile,
        )  # fmt: skip
        b_w = tl.exp((b_z - m) / divisor) if weighted else (b_z == b_z).to(tl.int32)
        while low < high:
            middle = (low + high + 1) >> 1
            enough = total + tl.sum(tl.where(b_z >= _value(middle), b_w, 0), 0) >= wanted
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["temperature", "top_k", "top_p", "n"])
def _threshold(
    z_ptr,  # [B, V] any float, row stride `stride`
    allowed_ptr,  # [B, words] i32 bits, or None
    max_ptr,  # [B, n] fp32: maxima of sub-tiles; +inf where one holds NaN or +inf
    found_ptr,  # [B, CANDIDATES] fp32, overwritten
    temperature_ptr,  # [B] fp32 or None, as the next two
    top_k_ptr,  # [B] i64; 0 is off
    top_p_ptr,  # [B] fp32; 1 is off
    floor_ptr,  # [B] fp32, written; −inf: nothing is cut, +inf: k or p is NaN or out of range
    V,
    stride,
    words,
    n,
    temperature: tl.float32,
    top_k: tl.int64,
    top_p: tl.float32,
    subtile: tl.constexpr,
    block_n: tl.constexpr,
    ways: tl.constexpr,
    dependent: tl.constexpr,
):
    lets_next_start(dependent)
    waits(dependent)
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.maximum(row_value(temperature_ptr, temperature, row, tl.float32), GREEDY_BELOW)
    k = row_value(top_k_ptr, top_k, row, tl.int64)
    p = row_value(top_p_ptr, top_p, row, tl.float32)
    o_n = tl.arange(0, block_n)
    b_max, m, _flag = row_maximum(
        z_ptr, allowed_ptr, max_ptr, row, V, stride, words, n, subtile, block_n
    )
    floor = -float("inf")
    if m > -float("inf"):
        high = _key(tl.where(m == 0, 0.0, m))  # −0.0 is as high, with a lower key
        if k > 0:
            b_sorted = tl.sort(finite(b_max), descending=True)
            low = tl.maximum(tl.max(tl.where(o_n == k - 1, b_sorted, LOWEST), 0), LOWEST)
            count, mass = _sum(
                z_ptr, allowed_ptr, max_ptr, row, low, m, divisor, V, stride, words, n, subtile
            )
            if count >= k:
                key = _largest(
                    z_ptr, allowed_ptr, max_ptr, found_ptr, row, _key(low), high, count, k, m,
                    divisor, V, stride, words, n, subtile, ways, False,
                )  # fmt: skip
                floor = _value(key)
        if p < 1:
            count, mass = _sum(
                z_ptr, allowed_ptr, max_ptr, row, tl.maximum(floor, LOWEST), m, divisor, V, stride,
                words, n, subtile,
            )  # fmt: skip
            # A little lower than the bound: it is only where the search begins.
            reach = m + divisor * tl.log((1 - p) / V) * 1.0001 - 1e-3
            low = tl.maximum(tl.maximum(reach, floor), LOWEST)
            count, _below = _sum(
                z_ptr, allowed_ptr, max_ptr, row, low, m, divisor, V, stride, words, n, subtile
            )
            key = _largest(
                z_ptr, allowed_ptr, max_ptr, found_ptr, row, _key(low), high, count, p * mass, m,
                divisor, V, stride, words, n, subtile, ways, True,
            )  # fmt: skip
            floor = _value(key)
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
    found = torch.empty(B, CANDIDATES.value, dtype=torch.float32, device=logits.device)
    p = parameters
    tensors, numbers = tensors_and_numbers(p.temperature, p.top_k, p.top_p)
    words = 0 if allowed is None else allowed.stride(0)
    block_n = max(16, triton.next_power_of_2(n))
    early = dependent(logits)
    _threshold[(B,)](
        logits, allowed, maxima, found, *tensors, floor,
        V, logits.stride(0), words, n, *numbers, tile, block_n, WAYS, early,
        num_warps=WARPS, **options(early),
    )  # fmt: skip
    return floor


_SIGNATURE = {
    **{"z_ptr": "*bf16", "allowed_ptr": "*i32", "max_ptr": "*fp32", "found_ptr": "*fp32"},
    **{"temperature_ptr": "*fp32", "top_k_ptr": "*i64", "top_p_ptr": "*fp32", "floor_ptr": "*fp32"},
    **dict.fromkeys(("V", "stride", "words", "n"), "i32"),
    **{"temperature": "fp32", "top_k": "i64", "top_p": "fp32"},
}
_BLOCKS = {"subtile": SUBTILE, "block_n": 1024, "ways": WAYS}
AOT = [
    (_threshold, _SIGNATURE, {**_BLOCKS, "dependent": False}, WARPS, None),
    (_threshold, _SIGNATURE, {**_BLOCKS, "dependent": True}, WARPS, None, *TARGETS),
]
