"""Statistics of the LM head's product, whose logits never reach device memory.

    z[n, v] = softcap·tanh(scale·(Σ_h x[n, h]·w[v, h] + bias[v]) / softcap)
    statistics as in kernels/logit_stats.py

    1. _target  grid [N]             the threshold z_y that ranks count against, if none is given:
                                     one dot product a row
    2. _tiles   grid [⌈N/rows⌉, S]   products in tiles [rows, block] through a split of V; partial
                                     sums a row and split
    3. _merge   grid [N]             the S splits of a row, in their order: no atomics, the same
                                     bits every time

Reads of w from device memory: once for all row blocks that run at the same time, since those walk
through one split together. Writes [K, N, S] fp32 partials (K = 4, or 7 with temperatures) and twice
as many int32 as rows and splits. fp32 operands are multiplied in fp32, not in TF32.

`_tiles` comes in three variants, all with one program for a split. `POINTERS` runs anywhere, in
smaller tiles for fp32. `HOPPER` fetches tiles by bulk copies (TMA), which leaves registers for
tiles of 256 × 128, ¾ of the cache traffic, and flattens both loops, so that copies go on during the
sums. `BLACKWELL` gives copies, products and sums to warps of their own; it needs Triton 3.7.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from autodeco_fast.backends import is_hopper

from .device import on_its_device
from .extrema import at_least
from .lm_head_tiles import (
    DEPTH_FP32,
    DEPTH_H,
    described_tile,
    exp,
    product_tile,
    rounded_to,
    step_of,
    transform,
)
from .logit_stats import moved


class Variant(NamedTuple):
    """Tiles and loops of `_tiles`; the scaled tile is for temperatures, which take more sums."""

    rows: int
    block: int
    scaled_rows: int
    scaled_block: int
    # Tensor descriptors instead of pointers: 16-bit operands, rows of a multiple of 16 bytes.
    described: bool = False
    flatten: bool = False
    specialize: bool = False

    def tile(self, scaled: bool) -> tuple[int, int]:
        return (self.scaled_rows, self.scaled_block) if scaled else (self.rows, self.block)


POINTERS = Variant(128, 128, 128, 64)
POINTERS_FP32 = Variant(64, 128, 64, 128)  # products outside of the matrix unit: larger ones spill
HOPPER = Variant(256, 128, 128, 64, described=True, flatten=True)
BLACKWELL = Variant(128, 128, 128, 64, described=True, specialize=True)
# 3.6.0 fails for sm_100.
COMPILES_SPECIALIZED = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)
WARPS, STAGES, TARGET_BLOCK = 8, 3, 1024
PROGRAMS = 528  # four for each multiprocessor of an H100, so that the last wave is a small part
MERGED = 1024  # splits that `_merge` looks at, whatever their number: one variant


@triton.jit
def _target(
    x_ptr, w_ptr, bias_ptr, column_ptr, out_ptr, H, x_stride, w_stride, scale, softcap,
    block: tl.constexpr, rounded: tl.constexpr, interpreted: tl.constexpr,
):  # fmt: skip
    """out[n] = z[n, column[n]]; −inf where the column is negative. `rounded`: of a product in the
    operands' type."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(column_ptr + row)
    safe_column = tl.maximum(column, 0)
    b_sum = tl.zeros((block,), tl.float32)
    for start in range(0, H, block):
        o_h = start + tl.arange(0, block)
        b_x = tl.load(x_ptr + row * x_stride + o_h, mask=o_h < H, other=0.0).to(tl.float32)
        b_sum += b_x * tl.load(w_ptr + safe_column * w_stride + o_h, mask=o_h < H, other=0.0).to(
            tl.float32
        )
    z = tl.sum(b_sum, 0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + safe_column).to(tl.float32)
    if rounded:
        z = rounded_to(z, x_ptr.dtype.element_ty, interpreted)
    tl.store(out_ptr + row, tl.where(column < 0, -float("inf"), transform(z, scale, softcap)))


@triton.jit
def _exp(b_x, specialize: tl.constexpr):
    """e^x of a tile; Triton 3.7 cannot compile the short way in warps of their own."""
    if specialize:
        b_e = tl.exp(b_x)
    else:
        b_e = exp(b_x)
    return b_e


@triton.jit(do_not_specialize=["N", "S", "depth"])
def _tiles(
    x_ptr,  # [N, H] any float, row stride x_stride; or a descriptor of blocks [rows, step]
    w_ptr,  # [V, H] of the same type, row stride w_stride; or a descriptor of blocks [block, step]
    bias_ptr,  # [V] any float, or None
    column_ptr,  # [N] i64: the target's column, or negative
    threshold_ptr,  # [N] fp32
    inverse_ptr,  # [N] fp32: 1/T, or None
    float_ptr,  # [4 or 7, N, S] fp32, written
    int_ptr,  # [2, N, S] i32, written
    N,
    V,
    H,
    x_stride,
    w_stride,
    S,
    depth,  # tiles a split
    scale,
    softcap,
    rows: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
    upcast: tl.constexpr,
    cut: tl.constexpr,
    described: tl.constexpr,
    flatten: tl.constexpr,
    specialize: tl.constexpr,
):
    row0 = tl.program_id(0) * rows
    split = tl.program_id(1)
    o_n = row0 + tl.arange(0, rows)
    m_n = o_n < N
    row = tl.minimum(o_n, N - 1).to(tl.int64)
    b_column = tl.load(column_ptr + row).to(tl.int32)
    b_threshold = tl.load(threshold_ptr + row)
    scaled: tl.constexpr = inverse_ptr is not None
    b_inverse = tl.load(inverse_ptr + row) if inverse_ptr is not None else 1.0
    zero = tl.zeros((rows,), tl.float32)
    b_max, b_target = zero - float("inf"), zero - float("inf")
    b_s, b_t, b_u, b_a, b_q = zero, zero, zero, zero, zero
    b_best, b_count = zero.to(tl.int32), zero.to(tl.int32)
    end = tl.minimum((split + 1) * depth, tl.cdiv(V, block))
    for tile in tl.range(split * depth, end, flatten=flatten, warp_specialize=specialize):
        if described:
            b_z = described_tile(
                x_ptr, w_ptr, bias_ptr, row0, tile, V, H, scale, softcap, rows, block, step, upcast
            )
        else:
            b_z = product_tile(
                x_ptr, w_ptr, bias_ptr, row0, tile, N, V, H, x_stride, w_stride, scale, softcap,
                rows, block, step, upcast,
            )  # fmt: skip
        o_v = tile * block + tl.arange(0, block)
        m_target = o_v[None, :] == b_column[:, None]
        b_target = tl.maximum(b_target, tl.max(tl.where(m_target, b_z, -float("inf")), 1))
        m_above = b_z > b_threshold[:, None]
        b_count += tl.sum((m_above & ~m_target).to(tl.int32), 1)
        b_top = tl.max(b_z, 1)
        b_first = tl.min(tl.where(b_z == b_top[:, None], o_v[None, :], 2147483647), 1)
        b_best = tl.where(b_top > b_max, b_first, b_best)
        b_new = tl.maximum(b_max, b_top)
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_d = tl.where(b_max == -float("inf"), 0.0, b_max - b_safe)
        # e^x is 0 there at any T below 900; 0·(−inf) must not reach a sum.
        b_x = at_least(b_z - b_safe[:, None], -1e5)
        if not cut:
            b_e = tl.where(b_z == -float("inf"), 0.0, _exp(b_x, specialize))
            b_s, b_t, _ = moved(b_d, b_s, b_t, zero)
            b_s += tl.sum(b_e, 1)
            b_t += tl.sum(b_e * b_x, 1)
        if scaled:
            b_x = b_x * b_inverse[:, None]
            b_e = _exp(b_x, specialize)
            if cut:
                b_e = tl.where(m_above | m_target, b_e, 0.0)
            else:
                b_e = tl.where(b_z == -float("inf"), 0.0, b_e)
            b_u, b_a, b_q = moved(b_d * b_inverse, b_u, b_a, b_q)
            b_u += tl.sum(b_e, 1)
            b_a += tl.sum(b_e * b_x, 1)
            b_q += tl.sum(b_e * b_x * b_x, 1)
        b_max = b_new
    plane = tl.cast(N, tl.int64) * S
    o = row * S + split
    tl.store(float_ptr + o, b_max, mask=m_n)
    tl.store(float_ptr + plane + o, b_target, mask=m_n)
    tl.store(float_ptr + 2 * plane + o, b_s, mask=m_n)
    tl.store(float_ptr + 3 * plane + o, b_t, mask=m_n)
    if scaled:
        tl.store(float_ptr + 4 * plane + o, b_u, mask=m_n)
        tl.store(float_ptr + 5 * plane + o, b_a, mask=m_n)
        tl.store(float_ptr + 6 * plane + o, b_q, mask=m_n)
    tl.store(int_ptr + o, b_best, mask=m_n)
    tl.store(int_ptr + plane + o, b_count, mask=m_n)


@triton.jit(do_not_specialize=["N", "S"])
def _merge(
    partial_ptr,  # [4 or 7, N, S] fp32
    partial_int_ptr,  # [2, N, S] i32
    inverse_ptr,  # [N] fp32 or None
    float_ptr,  # [4 or 7, N] fp32, written
    int_ptr,  # [2, N] i64, written
    N,
    S,
    block_s: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    plane = tl.cast(N, tl.int64) * S
    o_s = tl.arange(0, block_s)
    m_s = o_s < S
    p = partial_ptr + row * S + o_s
    b_max = tl.load(p, mask=m_s, other=-float("inf"))
    m = tl.max(b_max, 0)
    b_d = tl.where(b_max == m, 0.0, b_max - m)
    b_zero = tl.zeros((block_s,), tl.float32)
    b_s = tl.load(p + 2 * plane, mask=m_s, other=0.0)
    b_t = tl.load(p + 3 * plane, mask=m_s, other=0.0)
    b_s, b_t, _ = moved(b_d, b_s, b_t, b_zero)
    tl.store(float_ptr + row, m)
    tl.store(float_ptr + N + row, tl.max(tl.load(p + plane, mask=m_s, other=-float("inf")), 0))
    tl.store(float_ptr + 2 * N + row, tl.sum(b_s, 0))
    tl.store(float_ptr + 3 * N + row, tl.sum(b_t, 0))
    if inverse_ptr is not None:
        b_u = tl.load(p + 4 * plane, mask=m_s, other=0.0)
        b_a = tl.load(p + 5 * plane, mask=m_s, other=0.0)
        b_q = tl.load(p + 6 * plane, mask=m_s, other=0.0)
        b_u, b_a, b_q = moved(b_d * tl.load(inverse_ptr + row), b_u, b_a, b_q)
        tl.store(float_ptr + 4 * N + row, tl.sum(b_u, 0))
        tl.store(float_ptr + 5 * N + row, tl.sum(b_a, 0))
        tl.store(float_ptr + 6 * N + row, tl.sum(b_q, 0))
    p = partial_int_ptr + row * S + o_s
    b_best = tl.where(b_max == m, tl.load(p, mask=m_s, other=0), 2147483647)
    tl.store(int_ptr + row, tl.min(tl.where(m_s, b_best, 2147483647), 0).to(tl.int64))
    tl.store(int_ptr + N + row, tl.sum(tl.load(p + plane, mask=m_s, other=0), 0).to(tl.int64))


@on_its_device
def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    cut: bool = False,
    *,
    splits: int | None = None,
    variant: Variant | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernels.

    Args:
        hidden: `[N, H]` bf16, fp16 or fp32, unit stride along H; no ignored rows.
        weight: `[V, H]` of the same dtype, unit stride along H.
        column, threshold, inverse_temperature, scale, softcap, cut: as in
            `kernels.logit_stats.logit_stats`, no column −2. The column is in the sums of a cut,
            whatever the threshold, which may come from another product.
        bias: `[V]` or None.
        splits: of V; None chooses. It only changes rounding.
        variant: None takes `HOPPER` where it was measured to be faster, else pointers; operands
            that no descriptor fits are read by these anyway.

    Returns:
        floats `[4 or 7, N]` fp32 and ints `[2, N]` int64, as in `autodeco_fast/stats.py`.
    """
    (N, H), V = hidden.shape, weight.shape[0]
    scaled = inverse_temperature is not None
    pointers = POINTERS if hidden.element_size() == 2 else POINTERS_FP32
    if variant is None:
        variant = HOPPER if is_hopper(hidden.get_device()) and not scaled else pointers
    if variant.specialize and not COMPILES_SPECIALIZED:
        raise ValueError(f"variant BLACKWELL needs Triton 3.7 or newer, got {triton.__version__}")
    K = 7 if scaled else 4

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    floats, ints = new(K, N), new(2, N, dtype=torch.int64)
    if N == 0:
        return floats, ints
    if threshold is None:
        threshold = target_logit(hidden, weight, column, bias, scale, softcap)
    if variant.described and not (_describable(hidden) and _describable(weight)):
        variant = pointers
    rows, block = variant.tile(scaled)
    tiles, blocks = triton.cdiv(V, block), triton.cdiv(N, rows)
    depth = triton.cdiv(tiles, min(tiles, splits or triton.cdiv(PROGRAMS, blocks)))
    S = triton.cdiv(tiles, depth)
    partials, partial_ints = new(K, N, S), new(2, N, S, dtype=torch.int32)
    x, w, step = hidden, weight, step_of(hidden)
    if variant.described:
        x = TensorDescriptor.from_tensor(x, [rows, step])
        w = TensorDescriptor.from_tensor(w, [block, step])
    _tiles[(blocks, S)](
        x, w, bias, column, threshold, inverse_temperature, partials, partial_ints,
        N, V, H, hidden.stride(0), weight.stride(0), S, depth, float(scale), softcap,
        rows, block, step, hidden.dtype == torch.bfloat16 and not hidden.is_cuda, cut,
        *variant[4:], num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    block_s = max(MERGED, triton.next_power_of_2(S))
    _merge[(N,)](
        partials, partial_ints, inverse_temperature, floats, ints, N, S, block_s, num_warps=4
    )
    return floats, ints


def _describable(x: torch.Tensor) -> bool:
    """Whether bulk copies can read it: not rows that lie on one another."""
    apart = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    return x.element_size() == 2 and apart and x.data_ptr() % 16 == 0


@on_its_device
def target_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    *,
    rounded: bool = False,
) -> torch.Tensor:
    """`[N]` fp32 logits of these columns; −inf where the column is negative.

    Arguments as in `token_stats`; `rounded`: of a product in the dtype of hidden, as chunks hold
    it.
    """
    (N, H), out = hidden.shape, torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    if N:
        block = min(TARGET_BLOCK, max(16, triton.next_power_of_2(H)))
        _target[(N,)](
            hidden, weight, bias, column, out, H, hidden.stride(0), weight.stride(0),
            float(scale), softcap, block, rounded, not hidden.is_cuda,
        )  # fmt: skip
    return out


_DATA = {
    **dict.fromkeys(("x_ptr", "w_ptr"), "*bf16"),
    **{"column_ptr": "*i64", "threshold_ptr": "*fp32", "float_ptr": "*fp32", "int_ptr": "*i32"},
    **dict.fromkeys(("N", "V", "H", "x_stride", "w_stride", "S", "depth"), "i32"),
    "scale": "fp32",
}
_PLAIN, _ON_GPU = {"bias_ptr": None, "softcap": None}, {"interpreted": False}
_PARTIALS = {
    **{"partial_ptr": "*fp32", "partial_int_ptr": "*i32", "inverse_ptr": "*fp32"},
    **{"float_ptr": "*fp32", "int_ptr": "*i64", "N": "i32", "S": "i32"},
}
_DOT = {
    **{"x_ptr": "*bf16", "w_ptr": "*bf16", "column_ptr": "*i64", "out_ptr": "*fp32"},
    **{"H": "i32", "x_stride": "i32", "w_stride": "i32", "scale": "fp32"},
}


def _entry(
    variant: Variant, scaled: bool, *targets: str, cut: bool = False, data: str = "*bf16"
) -> tuple:
    """What is compiled ahead of time; of a variant for some targets, only for these."""
    rows, block = variant.tile(scaled)
    signature = {**_DATA, "inverse_ptr": "*fp32"} if scaled else dict(_DATA)
    signature |= dict.fromkeys(("x_ptr", "w_ptr"), data)
    step = DEPTH_H if data == "*bf16" else DEPTH_FP32
    if variant.described:
        signature["x_ptr"] = f"tensordesc<bf16[{rows},{DEPTH_H}]>"
        signature["w_ptr"] = f"tensordesc<bf16[{block},{DEPTH_H}]>"
    fixed = {**_PLAIN, "rows": rows, "block": block, "step": step}
    loops = dict(zip(Variant._fields[4:], variant[4:]))
    constants = {**fixed, "upcast": False, "cut": cut, **loops}
    if not scaled:
        constants["inverse_ptr"] = None
    return (_tiles, signature, constants, WARPS, STAGES, *targets)


AOT = [
    *(_entry(POINTERS, scaled) for scaled in (False, True)),
    *(_entry(POINTERS_FP32, scaled, data="*fp32") for scaled in (False, True)),
    _entry(POINTERS_FP32, True, cut=True, data="*fp32"),
    *(_entry(HOPPER, scaled, "sm_90") for scaled in (False, True)),
    *(_entry(BLACKWELL, scaled, "sm_100") for scaled in (False, True) if COMPILES_SPECIALIZED),
    _entry(POINTERS, True, cut=True),
    _entry(HOPPER, True, "sm_90", cut=True),
    *([_entry(BLACKWELL, True, "sm_100", cut=True)] if COMPILES_SPECIALIZED else []),
    (_merge, _PARTIALS, {"block_s": MERGED}, 4, None),
    *(
        (_target, _DOT, {**_PLAIN, "block": TARGET_BLOCK, "rounded": rounded, **_ON_GPU}, 4, None)
        for rounded in (False, True)
    ),
]
