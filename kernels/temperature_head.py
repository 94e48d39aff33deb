"""The temperature head, forward and backward.

    a = W1 h + b1        s = w2·relu(a) + b2        T = T_max·sigmoid(s)

    ds = dT·T·(1 − T/T_max)      da = ds·w2·[a > 0]      dw2 = Σ_n ds·relu(a)      db2 = Σ_n ds
    dW1 = daᵀ h                  db1 = Σ_n da            dh = da W1

h [N,H] and W1 [F,H] are read, T [N] is written. Three ways to a:

    few rows    _slab   grid [F/units, H/chunk, N/rows]  a slab of W1 [units, chunk] stays in
                        registers while rows go by, so that a matrix of 4 MB is read by 256
                        programs at once; products in fp32, their sums over a chunk are written
    16 bits     _tiles  grid [N/rows, F/units]  the matrix unit, in tiles [rows, units]; what is
                        written is a tile's share of s, so `[N, F]` never exists
    fp32        the vendor's product

and one kernel each behind them, for the sums of the first and the last, and for the second. The
backward computes a again, by the last two ways, and leaves its own two products to the vendor.
"""

import torch
import triton
import triton.language as tl

from .dependent_launch import TARGETS, dependent, lets_next_start, options, waits
from .device import on_its_device
from .extrema import at_least

FEW = 64  # rows
SLAB = {"units": 16, "chunk": 256, "rows": 16}  # 16 KB of W1 in fp32: 32 registers a thread
TILE = {"rows": 64, "units": 128, "block_h": 64}
SPLITS, BLOCK = 16, 256  # sums of chunks, and rows, that the kernels behind look at together


@triton.jit(do_not_specialize=["N"])
def _slab(
    h_ptr,  # [N, H] any float, row stride `stride_h`
    w1_ptr,  # [F, H]
    layer_ptr,  # [⌈H/chunk⌉, N, F] fp32, written: sums over a chunk of h·w1
    N,
    H,
    F,
    stride_h,
    units: tl.constexpr,
    chunk: tl.constexpr,
    rows: tl.constexpr,
    dependent: tl.constexpr,
):
    lets_next_start(dependent)
    o_f = tl.program_id(0) * units + tl.arange(0, units)
    o_h = tl.program_id(1) * chunk + tl.arange(0, chunk)
    m_f = o_f < F
    m_h = o_h < H
    p_w = w1_ptr + o_f[:, None] * H + o_h[None, :]
    b_w = tl.load(p_w, mask=m_f[:, None] & m_h[None, :], other=0.0)
    # As the matrix unit takes it: T does not jump where rows become many.
    b_w = b_w.to(h_ptr.dtype.element_ty).to(tl.float32)
    first = tl.program_id(2) * rows
    for n in tl.range(first, tl.minimum(first + rows, N), num_stages=4):
        b_h = tl.load(h_ptr + tl.cast(n, tl.int64) * stride_h + o_h, mask=m_h, other=0.0)
        b_a = tl.sum(b_w * b_h.to(tl.float32)[None, :], 1)
        tl.store(layer_ptr + (tl.program_id(1) * N + n) * F + o_f, b_a, mask=m_f)


@triton.jit(do_not_specialize=["N", "splits"])
def _join(
    layer_ptr,  # [splits, N, F] fp32, whose sum is W1 h
    b1_ptr,  # [F]
    w2_ptr,  # [F]
    b2_ptr,  # [1]
    t_ptr,  # [N] fp32, written
    N,
    F,
    splits,
    t_max,
    group: tl.constexpr,
    block_f: tl.constexpr,
    dependent: tl.constexpr,
):
    waits(dependent)
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.arange(0, block_f)
    m_f = o_f < F
    b_a = tl.load(b1_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)
    for first in range(0, splits, group):
        o_s = first + tl.arange(0, group)
        p = layer_ptr + (o_s[:, None] * tl.cast(N, tl.int64) + row) * F + o_f[None, :]
        b_a += tl.sum(tl.load(p, mask=(o_s < splits)[:, None] & m_f[None, :], other=0.0), 0)
    b_w2 = tl.load(w2_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)
    s = tl.sum(at_least(b_a, 0.0) * b_w2, 0) + tl.load(b2_ptr).to(tl.float32)
    tl.store(t_ptr + row, t_max * tl.sigmoid(s))


@triton.jit
def _hidden(
    h_ptr, w1_ptr, b1_ptr, o_n, o_f, m_n, m_f, H, F, stride_h,
    rows: tl.constexpr, units: tl.constexpr, block_h: tl.constexpr, upcast: tl.constexpr,
):  # fmt: skip
    """a [rows, units] fp32 = h W1ᵀ + b1; W1 is taken in h's dtype, products accumulate in fp32."""
    b_a = tl.zeros((rows, units), tl.float32)
    for start in range(0, H, block_h):
        o_h = start + tl.arange(0, block_h)
        m_h = o_h < H
        p_h = h_ptr + o_n[:, None] * stride_h + o_h[None, :]
        p_w = w1_ptr + o_f[None, :] * H + o_h[:, None]
        b_h = tl.load(p_h, mask=m_n[:, None] & m_h[None, :], other=0.0)
        b_w = tl.load(p_w, mask=m_f[None, :] & m_h[:, None], other=0.0).to(b_h.dtype)
        if upcast:  # Triton's interpreter would multiply the bit patterns of bf16
            b_h, b_w = b_h.to(tl.float32), b_w.to(tl.float32)
        b_a = tl.dot(b_h, b_w, b_a, input_precision="ieee")
    return b_a + tl.load(b1_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["N"])
def _tiles(
    h_ptr,  # [N, H] bf16 or fp16, row stride `stride_h`
    w1_ptr,  # [F, H]
    b1_ptr,  # [F]
    w2_ptr,  # [F]
    partial_ptr,  # [⌈F/units⌉, N] fp32, written
    N,
    H,
    F,
    stride_h,
    rows: tl.constexpr,
    units: tl.constexpr,
    block_h: tl.constexpr,
    upcast: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    split = tl.program_id(1)
    o_f = split * units + tl.arange(0, units)
    m_n = o_n < N
    m_f = o_f < F
    b_a = _hidden(
        h_ptr, w1_ptr, b1_ptr, o_n, o_f, m_n, m_f, H, F, stride_h, rows, units, block_h, upcast
    )
    b_w2 = tl.load(w2_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_s = tl.sum(at_least(b_a, 0.0) * b_w2[None, :], 1)
    tl.store(partial_ptr + split.to(tl.int64) * N + o_n, b_s, mask=m_n)


@triton.jit(do_not_specialize=["N", "splits"])
def _finish(
    partial_ptr,  # [splits, N] fp32
    b2_ptr,  # [1]
    t_ptr,  # [N] fp32, written
    N,
    splits,
    t_max,
    block: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    m_n = o_n < N
    b_s = tl.zeros((block,), tl.float32) + tl.load(b2_ptr).to(tl.float32)
    for split in range(0, splits):
        b_s += tl.load(partial_ptr + split * N + o_n, mask=m_n, other=0.0)
    tl.store(t_ptr + o_n, t_max * tl.sigmoid(b_s), mask=m_n)


@triton.jit(do_not_specialize=["N"])
def _backward(
    h_ptr,  # [N, H] bf16 or fp16
    w1_ptr,  # [F, H]
    b1_ptr,  # [F]
    w2_ptr,  # [F]
    ds_ptr,  # [N] fp32, in any unit: what is written is in the same
    da_ptr,  # [N, F] h's dtype, written
    db1_ptr,  # [row blocks, F] fp32, written
    dw2_ptr,  # [row blocks, F] fp32, written
    N,
    H,
    F,
    stride_h,
    rows: tl.constexpr,
    units: tl.constexpr,
    block_h: tl.constexpr,
    upcast: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    o_n = pid * rows + tl.arange(0, rows)
    o_f = tl.program_id(1) * units + tl.arange(0, units)
    m_n = o_n < N
    m_f = o_f < F
    b_a = _hidden(
        h_ptr, w1_ptr, b1_ptr, o_n, o_f, m_n, m_f, H, F, stride_h, rows, units, block_h, upcast
    )
    b_w2 = tl.load(w2_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_ds = tl.load(ds_ptr + o_n, mask=m_n, other=0.0)
    b_da = tl.where(b_a > 0, b_ds[:, None] * b_w2[None, :], 0.0)
    tl.store(da_ptr + o_n[:, None] * F + o_f[None, :], b_da, mask=m_n[:, None] & m_f[None, :])
    tl.store(db1_ptr + pid * F + o_f, tl.sum(b_da, 0), mask=m_f)
    tl.store(dw2_ptr + pid * F + o_f, tl.sum(at_least(b_a, 0.0) * b_ds[:, None], 0), mask=m_f)


def keeps(rows: int) -> bool:
    """Whether the hidden layer of so many rows is kept for the backward: never."""
    return False


def _upcast(hidden: torch.Tensor) -> bool:
    return hidden.dtype == torch.bfloat16 and not hidden.is_cuda


@on_its_device
def head_forward(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    max_temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T `[N]` fp32, and what the backward needs of the hidden layer: nothing, `[0, F]`.

    Args:
        hidden: `[N, H]` bf16, fp16 or fp32, unit stride along H.
        w1, b1, w2, b2: `[F, H]`, `[F]`, `[F]`, `[1]`, contiguous.
    """
    (N, H), F = hidden.shape, w1.shape[0]
    T = torch.empty(N, dtype=torch.float32, device=hidden.device)
    none = T.new_empty(0, F)
    if N == 0:
        return T, none
    if N > FEW and hidden.dtype != torch.float32:
        units = triton.cdiv(F, TILE["units"])
        partial = T.new_empty(units, N)
        _tiles[(triton.cdiv(N, TILE["rows"]), units)](
            hidden, w1, b1, w2, partial, N, H, F, hidden.stride(0), **TILE, upcast=_upcast(hidden)
        )
        _finish[(triton.cdiv(N, BLOCK),)](partial, b2, T, N, units, max_temperature, BLOCK)
        return T, none
    early = dependent(hidden)
    if N > FEW:
        layer = (hidden @ w1.to(hidden.dtype).T)[None]
    else:
        grid = [triton.cdiv(n, SLAB[k]) for k, n in (("units", F), ("chunk", H), ("rows", N))]
        layer = T.new_empty(grid[1], N, F)
        _slab[tuple(grid)](hidden, w1, layer, N, H, F, hidden.stride(0), **SLAB, dependent=early)
    block_f = max(16, triton.next_power_of_2(F))
    _join[(N,)](
        layer, b1, w2, b2, T, N, F, len(layer), max_temperature, SPLITS, block_f, early,
        **options(early),
    )  # fmt: skip
    return T, none


@on_its_device
def head_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    T: torch.Tensor,
    layer: torch.Tensor,
    max_temperature: float,
    need_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dW1, db1, dw2, db2, fp32, and dh in the dtype of hidden (empty unless asked for).

    Sums are taken in fp32. Those of dW1 are rounded to the dtype of hidden, as its products' da
    is.

    Args:
        grad: dT, `[N]` fp32.
        layer: what `head_forward` returned; the hidden layer is computed again.
    """
    ds = grad * T * (1 - T / max_temperature)
    if hidden.dtype == torch.float16:
        return _in_units(ds, hidden, w1, b1, w2, need_hidden)
    if hidden.dtype == torch.float32:
        a = torch.addmm(b1.float(), hidden, w1.float().T).relu_()
        da = torch.ops.aten.threshold_backward(torch.outer(ds, w2.float()), a, 0.0)  # 0 where a is
        db1, dw2 = da.sum(0), ds @ a
    else:
        da, db1, dw2 = _layer_gradients(ds, hidden, w1, b1, w2)
    dh = da @ w1.to(da.dtype) if need_hidden else hidden.new_empty(0)
    return (da.T @ hidden).float(), db1, dw2, ds.sum().view(1), dh


def _in_units(
    ds: torch.Tensor,
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    need_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `head_backward` returns, of fp16.

    fp16 holds nothing between 0 and 6e-8, where a mean's da lies: da is taken in units of the
    largest it can be. Of dW1 the mean over rows is rounded, since the sum could be too large.
    """
    if len(ds) == 0:
        unit = ds.new_ones(())
    else:
        unit = (ds.abs().amax() * w2.float().abs().amax()).clamp_(min=1e-30)
    rows = max(1, len(ds))
    da, db1, dw2 = _layer_gradients(ds / unit, hidden, w1, b1, w2)
    dw1 = torch.addmm(da.new_zeros(w1.shape), da.T, hidden, beta=0, alpha=1 / rows)
    dh = da @ w1.to(da.dtype) if need_hidden else hidden.new_empty(0)
    dh = (dh.float() * unit).to(hidden.dtype)
    return dw1.float() * (unit * rows), db1 * unit, dw2 * unit, ds.sum().view(1), dh


def _layer_gradients(
    ds: torch.Tensor, hidden: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """da in the dtype of hidden, 16 bits; db1 and dw2 in fp32."""
    (N, H), F = hidden.shape, w1.shape[0]
    blocks = triton.cdiv(N, TILE["rows"])
    da, db1, dw2 = hidden.new_empty(N, F), ds.new_empty(blocks, F), ds.new_empty(blocks, F)
    if N:
        _backward[(blocks, triton.cdiv(F, TILE["units"]))](
            hidden, w1, b1, w2, ds, da, db1, dw2, N, H, F, hidden.stride(0), **TILE,
            upcast=_upcast(hidden),
        )  # fmt: skip
    return da, db1.sum(0), dw2.sum(0)


_SIZES = {"N": "i32", "H": "i32", "F": "i32", "stride_h": "i32"}
_MATRICES = {"h_ptr": "*bf16", "w1_ptr": "*fp32", **_SIZES}
_VECTORS = {"b1_ptr": "*fp32", "w2_ptr": "*fp32"}
_OUT = {"b2_ptr": "*fp32", "t_ptr": "*fp32", "N": "i32", "splits": "i32", "t_max": "fp32"}
_GRADIENTS = {"ds_ptr": "*fp32", "da_ptr": "*bf16", "db1_ptr": "*fp32", "dw2_ptr": "*fp32"}
_SLAB, _TILE = {**_MATRICES, "layer_ptr": "*fp32"}, {**_MATRICES, **_VECTORS}
_JOIN = {**_VECTORS, **_OUT, "layer_ptr": "*fp32", "F": "i32"}
_JOINED = {"group": SPLITS, "block_f": 256}
AOT = [
    (_slab, _SLAB, {**SLAB, "dependent": False}, 4, None),
    (_slab, _SLAB, {**SLAB, "dependent": True}, 4, None, *TARGETS),
    (_slab, {**_SLAB, "h_ptr": "*fp32"}, {**SLAB, "dependent": False}, 4, None),
    (_join, _JOIN, {**_JOINED, "dependent": False}, 4, None),
    (_join, _JOIN, {**_JOINED, "dependent": True}, 4, None, *TARGETS),
    (_tiles, {**_TILE, "partial_ptr": "*fp32"}, {**TILE, "upcast": False}, 4, None),
    (_finish, {**_OUT, "partial_ptr": "*fp32"}, {"block": BLOCK}, 4, None),
    (_backward, {**_TILE, **_GRADIENTS}, {**TILE, "upcast": False}, 4, None),
]  # fmt: skip
