"""Reading a row of logits tile by tile: what the kernels that sample from logits share."""

import triton
import triton.language as tl

TILE = 1024  # logits read at once: 2 KB of bf16, one 16-byte load a thread at 4 warps
# Programs of a pass over [B, V], at least, while a row has that many tiles: seven or more on every
# multiprocessor.
PROGRAMS = 1024
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _allowed(b_z, allowed_ptr, row, o_v, V, words):
    """−inf where the bit is 0."""
    if allowed_ptr is not None:
        b_word = tl.load(allowed_ptr + row * words + o_v // 32, mask=o_v < V, other=0)
        b_z = tl.where((b_word >> (o_v % 32)) & 1 == 1, b_z, -float("inf"))
    return b_z


@triton.jit
def load_full_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block: tl.constexpr):
    """fp32 logits of a tile that ends before V; −inf where the bit is 0.

    Without a mask loads are wide for any V, and copied ahead in a loop with `num_stages`.
    """
    o_v = tile * block + tl.arange(0, block)
    b_z = tl.load(z_ptr + row * stride + o_v).to(tl.float32)
    return _allowed(b_z, allowed_ptr, row, o_v, V, words)


@triton.jit
def load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block: tl.constexpr):
    """fp32 logits of a tile; −inf beyond V and where the bit is 0."""
    o_v = tile * block + tl.arange(0, block)
    p_z = z_ptr + row * stride + o_v
    if (tile + 1) * block <= V:
        b_z = tl.load(p_z).to(tl.float32)
    else:
        b_z = tl.load(p_z, mask=o_v < V, other=-float("inf")).to(tl.float32)
    return _allowed(b_z, allowed_ptr, row, o_v, V, words)


@triton.jit
def finite(b_z):
    """NaN and +inf become −inf."""
    return tl.where(b_z < float("inf"), b_z, -float("inf"))


@triton.jit
def may_hold(b_top, v):
    """Whether sub-tiles with these maxima may hold logits ≥ v: also where it is +inf or NaN."""
    return ((b_top >= v) | (b_top != b_top)) & (b_top != -float("inf"))


@triton.jit
def reaching(max_ptr, row, first, n, v, group: tl.constexpr):
    """Numbers of a group of a row's n sub-tiles, and which of them may hold logits ≥ v."""
    o_n = first + tl.arange(0, group)
    b_top = tl.load(max_ptr + row * n + o_n, mask=o_n < n, other=-float("inf"))
    return o_n, may_hold(b_top, v)


@triton.jit
def next_reaching(o_n, b_reach, after, n):
    """The first of them behind `after`; n if there is none."""
    return tl.min(tl.where(b_reach & (o_n > after), o_n, n), 0)


@triton.jit
def row_maximum(
    z_ptr, allowed_ptr, max_ptr, row, V, stride, words, n, subtile: tl.constexpr,
    block_n: tl.constexpr,
):  # fmt: skip
    """The maxima of a row's n sub-tiles, +inf or NaN where one holds NaN or +inf, `[block_n]`; the
    maximum of what is finite, and 1 for NaN + 2 for +inf."""
    o_n = tl.arange(0, block_n)
    b_top = tl.load(max_ptr + row * n + o_n, mask=o_n < n, other=-float("inf"))
    m = tl.max(tl.where(b_top < float("inf"), b_top, float("inf")), 0)
    flag = 0
    if m == float("inf"):
        m = tl.max(finite(b_top), 0)
        for tile in range(0, n):
            top = tl.load(max_ptr + row * n + tile)
            if (top != top) | (top == float("inf")):
                b_z = load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, subtile)
                flag |= tl.max((b_z != b_z).to(tl.int32), 0)
                flag |= 2 * tl.max((b_z == float("inf")).to(tl.int32), 0)
                m = tl.maximum(m, tl.max(finite(b_z), 0))
    return b_top, m, flag


def splits_of(B: int, V: int, tile: int, splits: int | None = None) -> tuple[int, int]:
    """Splits of a row, and tiles in each.

    Enough programs to fill the device, as few partials as that allows; or at most `splits`.
    """
    tiles = triton.cdiv(V, tile)
    depth = max(1, B * tiles // PROGRAMS) if splits is None else triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, depth), depth
