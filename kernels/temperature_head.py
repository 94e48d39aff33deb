"""The temperature head, forward and backward.

    a = W1 h + b1        s = w2·relu(a) + b2        T = T_max·sigmoid(s)

    ds = dT·T·(1 − T/T_max)      da = ds·w2·[a > 0]      dw2 = Σ_n ds·relu(a)      db2 = Σ_n ds
    dW1 = daᵀ h                  db1 = Σ_n da            dh = da W1

Forward: h [N,H] and W1 [F,H] are read, T [N] is written; a program holds a [rows, units] tile of
    `a` and leaves one
partial of s a row, so `[N, F]` never exists. Few rows take few units a program, so that many
programs share the read of W1. Backward recomputes `a` the same way and writes da once; its two
products are left to the vendor's GEMM.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device


@triton.jit
def _hidden(
    h_ptr, w1_ptr, b1_ptr, o_n, o_f, m_n, m_f, H, F, stride_h,
    rows: tl.constexpr, units: tl.constexpr, block_h: tl.constexpr,
    precision: tl.constexpr, upcast: tl.constexpr,
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
        if upcast:
            b_a = tl.dot(b_h.to(tl.float32), b_w.to(tl.float32), b_a, input_precision=precision)
        else:
            b_a = tl.dot(b_h, b_w, b_a, input_precision=precision)
    return b_a + tl.load(b1_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _head_partial(
    h_ptr,  # [N, H] any float, row stride `stride_h`
    w1_ptr,  # [F, H]
    b1_ptr,  # [F]
    w2_ptr,  # [F]
    partial_ptr,  # [splits, N] fp32, written
    N,
    H,
    F,
    stride_h,
    rows: tl.constexpr,
    units: tl.constexpr,
    block_h: tl.constexpr,
    precision: tl.constexpr,
    upcast: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    split = tl.program_id(1)
    o_f = split * units + tl.arange(0, units)
    m_n = o_n < N
    m_f = o_f < F
    b_a = _hidden(
        h_ptr, w1_ptr, b1_ptr, o_n, o_f, m_n, m_f, H, F, stride_h, rows, units, block_h, precision,
        upcast,
    )  # fmt: skip
    b_w2 = tl.load(w2_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_s = tl.sum(tl.maximum(b_a, 0.0) * b_w2[None, :], 1)
    tl.store(partial_ptr + split.to(tl.int64) * N + o_n, b_s, mask=m_n)


@triton.jit
def _head_finish(
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


@triton.jit
def _head_bwd(
    h_ptr,  # [N, H]
    w1_ptr,  # [F, H]
    b1_ptr,  # [F]
    w2_ptr,  # [F]
    ds_ptr,  # [N] fp32
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
    precision: tl.constexpr,
    upcast: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    o_n = pid * rows + tl.arange(0, rows)
    o_f = tl.program_id(1) * units + tl.arange(0, units)
    m_n = o_n < N
    m_f = o_f < F
    b_a = _hidden(
        h_ptr, w1_ptr, b1_ptr, o_n, o_f, m_n, m_f, H, F, stride_h, rows, units, block_h, precision,
        upcast,
    )  # fmt: skip
    b_w2 = tl.load(w2_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_ds = tl.load(ds_ptr + o_n, mask=m_n, other=0.0)
    b_da = tl.where(b_a > 0, b_ds[:, None] * b_w2[None, :], 0.0)
    tl.store(da_ptr + o_n[:, None] * F + o_f[None, :], b_da, mask=m_n[:, None] & m_f[None, :])
    tl.store(db1_ptr + pid * F + o_f, tl.sum(b_da, 0), mask=m_f)
    tl.store(dw2_ptr + pid * F + o_f, tl.sum(tl.maximum(b_a, 0.0) * b_ds[:, None], 0), mask=m_f)


def _tiles(N: int, dtype: torch.dtype, interpreted: bool = False) -> dict:
    """Rows and units of a program: 16 units while rows are few, wide tiles for the matrix unit when
    they are many.

    Triton's interpreter multiplies the bit patterns of bf16, so there, and only there, the operands
    are widened first.
    """
    rest = {
        "precision": "ieee" if dtype == torch.float32 else "tf32",
        "upcast": interpreted and dtype == torch.bfloat16,
    }
    if N <= 64:
        return {"rows": 16, "units": 16, "block_h": 128, **rest}
    if dtype == torch.float32:
        return {"rows": 32, "units": 64, "block_h": 32, **rest}
    return {"rows": 64, "units": 128, "block_h": 64, **rest}


def keeps(rows: int) -> bool:
    """Whether the hidden layer of so many rows is kept for the backward: never."""
    return False


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
    layer = T.new_empty(0, F)
    if N == 0:
        return T, layer
    tile = _tiles(N, hidden.dtype, not hidden.is_cuda)
    splits = triton.cdiv(F, tile["units"])
    partial = torch.empty(splits, N, dtype=torch.float32, device=hidden.device)
    _head_partial[(triton.cdiv(N, tile["rows"]), splits)](
        hidden, w1, b1, w2, partial, N, H, F, hidden.stride(0), **tile
    )
    _head_finish[(triton.cdiv(N, 256),)](partial, b2, T, N, splits, max_temperature, 256)
    return T, layer


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
    """dW1, db1, dw2, db2 and dh (empty unless asked for); sums are returned in fp32.

    Args:
        grad: dT, `[N]` fp32.
        layer: what `head_forward` returned; the hidden layer is computed again.
    """
    (N, H), F = hidden.shape, w1.shape[0]
    ds = grad * T * (1 - T / max_temperature)
    tile = _tiles(N, hidden.dtype, not hidden.is_cuda)
    blocks = triton.cdiv(N, tile["rows"])
    da = torch.empty(N, F, dtype=hidden.dtype, device=hidden.device)
    db1, dw2 = (torch.empty(blocks, F, dtype=torch.float32, device=hidden.device) for _ in range(2))
    if N:
        _head_bwd[(blocks, triton.cdiv(F, tile["units"]))](
            hidden, w1, b1, w2, ds, da, db1, dw2, N, H, F, hidden.stride(0), **tile
        )
    dh = da @ w1.to(da.dtype) if need_hidden else hidden.new_empty(0)
    return (da.T @ hidden).float(), db1.sum(0), dw2.sum(0), ds.sum().view(1), dh


_IN = {"h_ptr": "*bf16", "w1_ptr": "*fp32", "b1_ptr": "*fp32", "w2_ptr": "*fp32"}
_SIZES = {"N": "i32", "H": "i32", "F": "i32", "stride_h": "i32"}
_BWD = {
    **_IN,
    "ds_ptr": "*fp32",
    "da_ptr": "*bf16",
    "db1_ptr": "*fp32",
    "dw2_ptr": "*fp32",
    **_SIZES,
}
_PARTIAL = {**_IN, "partial_ptr": "*fp32", **_SIZES}
_FINISH = {
    **{"partial_ptr": "*fp32", "b2_ptr": "*fp32", "t_ptr": "*fp32"},
    **{"N": "i32", "splits": "i32", "t_max": "fp32"},
}
AOT = [
    (_head_partial, _PARTIAL, _tiles(1, torch.bfloat16), 4, 3),
    (_head_partial, _PARTIAL, _tiles(4096, torch.bfloat16), 4, 3),
    (_head_partial, {**_PARTIAL, "h_ptr": "*fp32"}, _tiles(4096, torch.float32), 4, 3),
    (_head_bwd, _BWD, _tiles(4096, torch.bfloat16), 4, 3),
    (_head_finish, _FINISH, {"block": 256}, 4, 3),
]
