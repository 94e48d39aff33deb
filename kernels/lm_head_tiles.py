"""Tiles of the LM head's product: what the kernels that never write logits share.

z[b, v] = softcap·tanh(scale·(Σ_h x[b, h]·w[v, h] + bias[v]) / softcap)    (None: no tanh)

Sums are fp32. `rounded`, what is in the inner brackets is rounded to the type of x and w, as a
plain product is.
"""

import torch
import triton
import triton.language as tl

DEPTH_H = 64  # a step along H in 16-bit operands
DEPTH_FP32 = 16  # in fp32, whose products are made in registers: longer steps spill


def step_of(operand: torch.Tensor) -> int:
    """A step along H."""
    return DEPTH_FP32 if operand.element_size() == 4 else DEPTH_H


@triton.jit
def exp(b_x):
    """e^x in two instructions. `tl.exp` takes five, for results below 2⁻¹²⁶; here these are 0."""
    return tl.exp2(b_x * 1.4426950408889634)


@triton.jit
def rounded_to(z, dtype: tl.constexpr, interpreted: tl.constexpr):
    """fp32 numbers, rounded to the nearest of a type."""
    if interpreted and dtype == tl.bfloat16:  # Triton's interpreter would cut the bits off
        bits = z.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        z = tl.where(z == z, bits.to(tl.float32, bitcast=True), z)
    else:
        z = z.to(dtype).to(tl.float32)
    return z


@triton.jit
def transform(b_x, scale, softcap):
    """Logits from the product: scale, then softcap; None leaves one out.

    tanh(a) = a·(1 − a²/3 + 2a⁴/15 − …) near 0, else from e^{−2|a|}.
    """
    b_z = b_x if scale is None else b_x * scale
    if softcap is not None:
        b_a = b_z / softcap
        b_q = b_a * b_a
        b_series = -1 / 3 + b_q * (2 / 15 + b_q * (-17 / 315 + b_q * (62 / 2835)))
        b_small = b_a * (1.0 + b_q * b_series)
        b_e = tl.exp(-2.0 * tl.abs(b_a))
        b_large = (1.0 - b_e) / (1.0 + b_e)
        b_large = tl.where(b_a < 0, -b_large, b_large)
        b_z = softcap * tl.where(tl.abs(b_a) < 0.2, b_small, b_large)
    return b_z


@triton.jit
def product_tile(
    x_ptr, w_ptr, bias_ptr, row0, tile, B, V, H, x_stride, w_stride, scale, softcap,
    rows: tl.constexpr, block: tl.constexpr, step: tl.constexpr, upcast: tl.constexpr,
    list_ptr=None, rounded: tl.constexpr = False,
):  # fmt: skip
    """fp32 logits `[rows, block]` of a tile; −inf beyond V. `upcast`: bf16 that is interpreted.

    Always the same tile shape and order along H, also where the tile is of listed tokens: those of
    the places `tile·block …` in `list_ptr`, V and beyond for none. A tile without any reads no
    weight.
    """
    o_v = token_ids(list_ptr, tile, block)
    o_h = tl.arange(0, step)
    # Rows beyond the last are read as the last one and masked at the end. Rows of hidden states may
    # lie anywhere (the last position of each sequence): 64 bits.
    row = tl.minimum(row0 + tl.arange(0, rows), B - 1).to(tl.int64)
    p_x = x_ptr + row[:, None] * x_stride
    if list_ptr is None:
        width = H
        p_w = w_ptr + tl.minimum(o_v, V - 1).to(tl.int64)[None, :] * w_stride
    else:
        width = tl.where(tl.load(list_ptr + tile * block) < V, H, 0)
        p_w = w_ptr + o_v.to(tl.int64)[None, :] * w_stride
    b_z = tl.zeros((rows, block), tl.float32)
    for h in range(0, width, step):
        m_h = h + o_h < H
        b_x = tl.load(p_x + (h + o_h)[None, :], mask=m_h[None, :], other=0.0)
        m_w = m_h[:, None] if list_ptr is None else m_h[:, None] & (o_v < V)[None, :]
        b_w = tl.load(p_w + (h + o_h)[:, None], mask=m_w, other=0.0)
        if upcast:  # Triton's interpreter would multiply the bit patterns of bf16
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_z = tl.dot(b_x, b_w, b_z, input_precision="ieee")
    dtype: tl.constexpr = x_ptr.dtype.element_ty if rounded else tl.float32
    return logits_of(b_z, bias_ptr, o_v, V, scale, softcap, dtype, upcast)


@triton.jit
def row_of_tile(b_z, m_row, o_v, V, scale, softcap, dtype: tl.constexpr, interpreted: tl.constexpr):
    """The logits `[block]` of the row that is True in `m_row [rows]`, as `product_tile` rounds them
    and transforms them, from its plain products. In one row that takes fewer registers."""
    b_z = tl.max(tl.where(m_row[:, None], b_z, -float("inf")), 0)
    b_z = transform(rounded_to(b_z, dtype, interpreted), scale, softcap)
    if softcap is not None:  # of −inf it makes a number
        b_z = tl.where(o_v < V, b_z, -float("inf"))
    return b_z


@triton.jit
def token_ids(list_ptr, tile, block: tl.constexpr):
    """Of a tile's columns: neighbours, or those that are listed."""
    o_v = tile * block + tl.arange(0, block)
    if list_ptr is not None:
        o_v = tl.load(list_ptr + o_v)
    return o_v


@triton.jit
def described_tile(
    x_desc, w_desc, bias_ptr, row0, tile, V, H, scale, softcap,
    rows: tl.constexpr, block: tl.constexpr, step: tl.constexpr, upcast: tl.constexpr,
):  # fmt: skip
    """The same by bulk copies, from tensor descriptors of x and w in blocks `[rows, step]` and
    `[block, step]`."""
    b_z = tl.zeros((rows, block), tl.float32)
    for h in range(0, H, step):
        b_x, b_w = x_desc.load([row0, h]), w_desc.load([tile * block, h]).T
        if upcast:
            b_x, b_w = b_x.to(tl.float32), b_w.to(tl.float32)
        b_z = tl.dot(b_x, b_w, b_z, input_precision="ieee")
    o_v = tile * block + tl.arange(0, block)
    return logits_of(b_z, bias_ptr, o_v, V, scale, softcap, tl.float32, upcast)


@triton.jit
def logits_of(
    b_z, bias_ptr, o_v, V, scale, softcap, dtype: tl.constexpr, interpreted: tl.constexpr
):
    """A tile's products with bias, rounded to a type, and transform; −inf beyond V."""
    if bias_ptr is not None:
        b_z += tl.load(bias_ptr + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    b_z = transform(rounded_to(b_z, dtype, interpreted), scale, softcap)
    return tl.where((o_v < V)[None, :], b_z, -float("inf"))
