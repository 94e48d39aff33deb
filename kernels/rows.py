"""Reading rows of logits and their parameters: what the sampling kernels share."""

import torch
import triton
import triton.language as tl

TILE = 1024  # logits read at once: 2 KB of bf16, one 16-byte load a thread at 4 warps
PROGRAMS = 1024  # of a pass over [B, V], at least, while a row has that many tiles: seven or more on every multiprocessor
GREEDY_BELOW = tl.constexpr(1e-3)
HOTTEST = tl.constexpr(1e29)  # z + T·g of a finite z stays finite
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def row_value(ptr, value, row, kind: tl.constexpr):
    """A row's parameter: from `[B]` if there is a tensor, else the number that all rows share."""
    if ptr is None:
        return tl.cast(value, kind)
    else:
        return tl.load(ptr + row).to(kind)


@triton.jit
def temperature_and_cut(temperature, min_p):
    """T and c = T·ln p_min, both 0 in greedy rows. Where one is NaN or out of range c is +inf: no
    token reaches max z + c."""
    greedy = temperature < GREEDY_BELOW
    usable = (temperature >= 0) & (temperature <= HOTTEST)
    cuts = (min_p >= 0) & (
        min_p <= 1
    )  # of another shape than T where one is a number: the interpreter joins no such bools
    c = tl.where(greedy, 0.0, temperature * tl.where(cuts, tl.log(min_p), 0.0))
    c = tl.where(usable, c, float("inf")) + tl.where(cuts, 0.0, float("inf"))
    return tl.where(usable, tl.where(greedy, 0.0, temperature), 0.0), c


@triton.jit
def row_parameters(
    temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr, temperature, min_p, seed, position, stream, stream_step, row
):  # fmt: skip
    """T, c, seed, position and stream of a row, or of a block of rows."""
    T, c = temperature_and_cut(
        row_value(temperature_ptr, temperature, row, tl.float32),
        row_value(min_p_ptr, min_p, row, tl.float32),
    )
    key = row_value(seed_ptr, seed, row, tl.int64)
    place = row_value(position_ptr, position, row, tl.int64)
    return T, c, key, place, row_value(stream_ptr, stream + row * stream_step, row, tl.int64)


@triton.jit
def load_tile(z_ptr, allowed_ptr, row, tile, V, stride, words, block: tl.constexpr):
    """fp32 logits of a tile; −inf beyond V and where the bit is 0. Full tiles load unmasked: wide
    for any V."""
    o_v = tile * block + tl.arange(0, block)
    p_z = z_ptr + row * stride + o_v
    if (tile + 1) * block <= V:
        b_z = tl.load(p_z).to(tl.float32)
    else:
        b_z = tl.load(p_z, mask=o_v < V, other=-float("inf")).to(tl.float32)
    if allowed_ptr is not None:
        b_word = tl.load(allowed_ptr + row * words + o_v // 32, mask=o_v < V, other=0)
        b_z = tl.where((b_word >> (o_v % 32)) & 1 == 1, b_z, -float("inf"))
    return b_z


@triton.jit
def finite(b_z):
    """NaN and +inf become −inf."""
    return tl.where(b_z < float("inf"), b_z, -float("inf"))


def splits_of(B: int, V: int, tile: int) -> tuple[int, int]:
    """Splits of a row, and tiles in each: enough programs to fill the device, as few partials as
    that allows."""
    tiles = triton.cdiv(V, tile)
    depth = max(1, B * tiles // PROGRAMS)
    return triton.cdiv(tiles, depth), depth


def row_or_number(value: torch.Tensor | float) -> tuple[torch.Tensor | None, float]:
    """(pointer, number) for a kernel: a `[B]` tensor, or what all rows share."""
    return (value, 0) if isinstance(value, torch.Tensor) else (None, value)
