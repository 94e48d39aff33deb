"""The maximum of every sub-tile of 256 logits: all that a draw needs of a row as a whole.

    maxima[b, i] = max z[b, 256 i … 256 i + 255],   +inf where one of them is NaN or +inf

This is the one read of the logits from memory, `sample`'s first kernel, and does not depend on T.
With temperatures it may carry Σ e^{(z − max)/T} of each sub-tile too.

Reads B·V elements, writes 4 bytes a sub-tile, 12 with the sums. Grid [B, S]; full tiles are copied
ahead of their comparisons.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.sampling import SUBTILE

from .dependent_launch import TARGETS, dependent, lets_next_start
from .device import on_its_device
from .logit_tiles import LOWEST, TILE, finite, load_full_tile, load_tile, splits_of
from .row_parameters import GREEDY_BELOW, row_value


@triton.jit
def _store_maxima(
    b_z, max_ptr, sum_ptr, plane, tile, n, divisor, block: tl.constexpr, subtile: tl.constexpr
):
    """Those of a tile's sub-tiles, at a row's place; a `plane` further what else is asked for."""
    per_tile: tl.constexpr = block // subtile
    b_z = tl.reshape(b_z, [per_tile, subtile])
    o_n = tile * per_tile + tl.arange(0, per_tile)
    # A NaN becomes +inf too: one comparison finds both.
    b_top = tl.max(tl.where(b_z < float("inf"), b_z, float("inf")), 1)
    tl.store(max_ptr + o_n, b_top, mask=o_n < n)
    if sum_ptr is not None:
        b_z = finite(b_z)
        b_top = tl.max(b_z, 1)
        b_sum = tl.sum(tl.exp((b_z - tl.maximum(b_top, LOWEST)[:, None]) / divisor), 1)
        tl.store(sum_ptr + o_n, b_top, mask=o_n < n)
        tl.store(sum_ptr + plane + o_n, b_sum, mask=o_n < n)


@triton.jit(do_not_specialize=["temperature", "n", "depth"])
def _maxima(
    z_ptr,  # [B, V] any float, row stride `stride`
    allowed_ptr,  # [B, words] i32 bits, or None
    temperature_ptr,  # [B] fp32 or None; for sum_ptr alone
    max_ptr,  # [B, n] fp32, written: maxima of sub-tiles; +inf where one holds NaN or +inf
    sum_ptr,  # [2, B, n] fp32, written: maxima of what is finite, Σ e^{(z − that)/T}; or None
    done_ptr,  # [B] i32, written: 0, for the kernel behind to count in; or None
    V,
    stride,
    words,
    n,  # sub-tiles of a row
    depth,  # tiles a split
    temperature: tl.float32,
    block: tl.constexpr,
    subtile: tl.constexpr,
    dependent: tl.constexpr,
):
    lets_next_start(dependent)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * depth
    plane = tl.num_programs(0).to(tl.int64) * n
    T = row_value(temperature_ptr, temperature, row, tl.float32)
    divisor = tl.maximum(T, GREEDY_BELOW)
    if done_ptr is not None:
        tl.store(done_ptr + row, 0)
    if sum_ptr is not None:
        sum_ptr += row * n
    max_ptr += row * n
    full = V // block
    for tile in tl.range(first, tl.minimum(first + depth, full), num_stages=4):
        b_z = load_full_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block)
        _store_maxima(b_z, max_ptr, sum_ptr, plane, tile, n, divisor, block, subtile)
    if (full < first + depth) & (full * block < V):
        b_z = load_tile(z_ptr, allowed_ptr, row, full, V, stride, words, block)
        _store_maxima(b_z, max_ptr, sum_ptr, plane, full, n, divisor, block, subtile)


def write_maxima(
    logits: torch.Tensor,
    allowed: torch.Tensor | None,
    maxima: torch.Tensor,
    sums: torch.Tensor | None = None,
    temperature: torch.Tensor | float = 0.0,
    *,
    done: torch.Tensor | None = None,
    tile: int = TILE,
    splits: int | None = None,
) -> None:
    """Launches the kernel, on the current device; arguments as in it."""
    B, V = logits.shape
    S, depth = splits_of(B, V, tile, splits)
    by_row = isinstance(temperature, torch.Tensor)
    _maxima[(B, S)](
        logits, allowed, temperature if by_row else None, maxima, sums, done, V, logits.stride(0),
        0 if allowed is None else allowed.stride(0), maxima.shape[1], depth,
        0.0 if by_row else temperature, tile, min(SUBTILE, tile), dependent(logits),
    )  # fmt: skip


@on_its_device
def subtile_maxima(logits: torch.Tensor, *, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """`[B, ⌈V/256⌉]` fp32 maxima of sub-tiles; +inf where one holds NaN or +inf.

    Args:
        logits: `[B, V]` bf16, fp16 or fp32, unit stride along V.
        allowed: `[B, ⌈V/32⌉]` int32: bit i % 32 of word i // 32 allows id i; others are −inf.
    """
    B, V = logits.shape
    maxima = torch.empty(B, triton.cdiv(V, SUBTILE), dtype=torch.float32, device=logits.device)
    if B:
        write_maxima(logits, allowed, maxima)
    return maxima


_SIGNATURE = {
    **{"z_ptr": "*bf16", "max_ptr": "*fp32", "done_ptr": "*i32", "temperature": "fp32"},
    **dict.fromkeys(("V", "stride", "words", "n", "depth"), "i32"),
}
_ALL = {"allowed_ptr": "*i32", "temperature_ptr": "*fp32", "sum_ptr": "*fp32"}
_TILE = {"block": TILE, "subtile": SUBTILE, "dependent": False}
_PLAIN = {**dict.fromkeys(_ALL), **_TILE}
AOT = [  # as a draw without cuts needs it; everything
    (_maxima, _SIGNATURE, _PLAIN, 4, None),
    (_maxima, {**_SIGNATURE, **_ALL}, _TILE, 4, None),
    (_maxima, _SIGNATURE, {**_PLAIN, "dependent": True}, 4, None, *TARGETS),
]
