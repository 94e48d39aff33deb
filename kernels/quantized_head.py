"""The draw of kernels/linear_sample.py with half its bytes: an 8-bit copy of the weight is read
instead of it, and of the weight itself only the tokens that the copy cannot rule out.

    w = a·q + e          q of 8 bits, for each token: `autodeco_fast/quantized_head.py`
    h = k·(p + s/256) + f       p and s of 8 bits, k a power of two, for each row
    ẑ = a·k·(p·q + (s·q)/256)       both products exact, in int32: no code is widened
    |z − ẑ| ≤ ‖h‖·r + ‖f‖·a·‖q‖ = ρ,    z before it is rounded to the weight's type
    R(z) ≤ R(ẑ + ρ) < R(max (ẑ − ρ)) + c ≤ R(max z) + c    rules a token out: R keeps order

    1. _parts   grid [B]            p, s, k and the norms of a row; f is exact
    2. _screen  grid [⌈B/rows⌉, S]  ẑ in tiles [rows, block] through every S-th tile of V. Kept are
                                    the highest that 4 neighbouring logits can be; the lowest that
                                    the highest of a program is; and a bit for each token that some
                                    row of the program could not yet rule out by its own tiles
    3. _list    grid [V / 1,024]    with the lowest that a row's maximum can be, + c: the tokens
                                    that are left, in rising order
    4. _tiles, _settle of kernels/linear_sample.py on tiles of the tokens that are listed

Those tiles have the shape and the order along H of all others, and a column of a product does not
depend on its neighbours: a logit is the one of the plain call, bit for bit. So are its noise, the
order of ids and the maximum, which is never ruled out; so is the token.

Reads V·H bytes of codes and 2·H or 4·H a token that is left. Writes V bytes a row.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.quantized_head import QuantizedLMHead
from autodeco_fast.sampling import Sampled, SamplingParameters, tensors_and_numbers

from .device import on_its_device
from .linear_sample import draw
from .lm_head_tiles import rounded_to
from .logit_tiles import finite
from .row_parameters import row_value, temperature_and_cut

GROUP = 4  # neighbouring tokens that share an upper bound
CHUNK = 1024  # tokens that are listed together
PROGRAMS = 264  # two for each multiprocessor of an H100
_UP = tl.constexpr(1 + 1e-6)  # more than the roundings of a bound


@triton.jit
def _codes(b_x):
    """The nearest integers in −127 … 127, as fp32."""
    return tl.minimum(tl.maximum(tl.floor(b_x + 0.5), -127.0), 127.0)


@triton.jit
def _parts(
    x_ptr,  # [B, H] any float, row stride x_stride
    part_ptr,  # [2, B, H] i8, written: p, s
    row_ptr,  # [3, B] fp32, written: k, ‖h‖, ‖f‖
    H,
    x_stride,
    up,  # more than the relative error of a sum of H squares in fp32
    block_h: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    B = tl.num_programs(0).to(tl.int64)
    o_h = tl.arange(0, block_h)
    m_h = o_h < H
    b_x = tl.load(x_ptr + row * x_stride + o_h, mask=m_h, other=0.0).to(tl.float32)
    # The power of two at or above max |h| / 127; within 2^±100, which has an inverse.
    exponent = (tl.max(tl.abs(b_x), 0) * (1 / 127)).to(tl.int32, bitcast=True)
    exponent = ((exponent & 0x7FFFFFFF) + 0x7FFFFF) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 27), 227)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    b_p = _codes(b_x * inverse)
    b_rest = b_x - unit * b_p
    b_s = _codes(b_rest * (256 * inverse))
    b_f = b_rest - (unit / 256) * b_s
    p_part = part_ptr + row * H + o_h
    tl.store(p_part, b_p.to(tl.int8), mask=m_h)
    tl.store(p_part + B * H, b_s.to(tl.int8), mask=m_h)
    tl.store(row_ptr + row, unit)
    # 1e-16: of squares below 2⁻¹²⁶.
    tl.store(row_ptr + B + row, tl.sqrt(tl.sum(b_x * b_x, 0)) * up + 1e-16)
    tl.store(row_ptr + 2 * B + row, tl.sqrt(tl.sum(b_f * b_f, 0)) * up + 1e-16)


@triton.jit
def _cut(temperature_ptr, min_p_ptr, temperature, min_p, row):
    """c of rows, rounded down; 0 where nothing will be kept."""
    _, c = temperature_and_cut(
        row_value(temperature_ptr, temperature, row, tl.float32),
        row_value(min_p_ptr, min_p, row, tl.float32),
    )
    return tl.where(c < float("inf"), c * _UP, 0.0)


_UNSPECIALIZED = ["B", "n", "S", "temperature", "min_p"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _screen(
    part_ptr,  # [2, B, H] i8
    row_ptr,  # [3, B] fp32
    code_ptr,  # [V, H] i8: q
    scale_ptr,  # [V] fp32: a
    radius_ptr,  # [V] fp32: r
    length_ptr,  # [V] fp32: a·‖q‖
    temperature_ptr,  # [B] fp32 or None, as the next
    min_p_ptr,  # [B] fp32
    high_ptr,  # [B, groups] fp32, written: the highest that a group's logits can be
    low_ptr,  # [B, S] fp32, written: the lowest that the maximum of a program's logits can be
    bit_ptr,  # [⌈B/rows⌉, groups] i32, written: bit i for token i of the group
    B,
    V,
    H,
    n,  # tiles of V
    groups,
    S,
    temperature: tl.float32,
    min_p: tl.float32,
    rows: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
    group: tl.constexpr,
    halves: tl.constexpr,  # whether the weight is bf16, or else fp32
    interpreted: tl.constexpr,
):
    dtype: tl.constexpr = tl.bfloat16 if halves else tl.float32
    row0 = tl.program_id(0) * rows
    o_b = row0 + tl.arange(0, rows)
    m_b = o_b < B
    row = tl.minimum(o_b, B - 1).to(tl.int64)
    b_unit = tl.load(row_ptr + row)
    b_size = tl.load(row_ptr + B + row)
    b_left = tl.load(row_ptr + 2 * tl.cast(B, tl.int64) + row)
    b_c = _cut(temperature_ptr, min_p_ptr, temperature, min_p, row) + tl.zeros((rows,), tl.float32)
    b_low = tl.zeros((rows,), tl.float32) - float("inf")
    o_h = tl.arange(0, step)
    p_p = part_ptr + (row * H)[:, None]
    p_s = p_p + tl.cast(B, tl.int64) * H
    per_tile: tl.constexpr = block // group
    for tile in range(tl.program_id(1), n, S):
        o_v = tile * block + tl.arange(0, block)
        m_v = o_v < V
        o_column = tl.minimum(o_v, V - 1) - tile * block
        p_q = code_ptr + tl.cast(tile * block, tl.int64) * H + o_column[None, :] * H
        b_pq = tl.zeros((rows, block), tl.int32)
        b_sq = tl.zeros((rows, block), tl.int32)
        for h in range(0, H, step):
            m_h = h + o_h < H
            b_p = tl.load(p_p + (h + o_h)[None, :], mask=m_h[None, :], other=0)
            b_s = tl.load(p_s + (h + o_h)[None, :], mask=m_h[None, :], other=0)
            b_q = tl.load(p_q + (h + o_h)[:, None], mask=m_h[:, None], other=0)
            b_pq = tl.dot(b_p, b_q, b_pq, out_dtype=tl.int32)
            b_sq = tl.dot(b_s, b_q, b_sq, out_dtype=tl.int32)
        b_a = tl.load(scale_ptr + o_v, mask=m_v, other=0.0)
        b_r = tl.load(radius_ptr + o_v, mask=m_v, other=0.0)
        b_length = tl.load(length_ptr + o_v, mask=m_v, other=0.0)
        b_z = (b_pq.to(tl.float32) + b_sq.to(tl.float32) / 256) * b_unit[:, None] * b_a[None, :]
        b_reach = b_size[:, None] * b_r[None, :] + b_left[:, None] * b_length[None, :]
        b_reach = b_reach * _UP + 1e-30  # of products below 2⁻¹²⁶
        b_least = finite(rounded_to(b_z - b_reach, dtype, interpreted))
        b_least = tl.where(m_v[None, :], b_least, -float("inf"))
        b_low = tl.maximum(b_low, tl.max(b_least, 1))
        b_most = rounded_to(b_z + b_reach, dtype, interpreted)
        # What is not known may be anything: NaN becomes +inf.
        b_most = tl.where(b_most < float("inf"), b_most, float("inf"))
        b_most = tl.where(m_v[None, :], b_most, -float("inf"))
        o_n = tile * per_tile + tl.arange(0, per_tile)
        b_high = tl.max(tl.reshape(b_most, [rows, per_tile, group]), 2)
        m_n = m_b[:, None] & (o_n < groups)[None, :]
        tl.store(high_ptr + (row * groups)[:, None] + o_n[None, :], b_high, mask=m_n)
        m_open = m_b[:, None] & (b_most >= (b_low + b_c)[:, None]) & m_v[None, :]
        b_bit = tl.reshape(tl.max(m_open.to(tl.int32), 0), [per_tile, group])
        b_bit = tl.sum(b_bit << tl.arange(0, group)[None, :], 1)
        tl.store(bit_ptr + tl.program_id(0) * groups + o_n, b_bit, mask=o_n < groups)
    tl.store(low_ptr + row * S + tl.program_id(1), b_low, mask=m_b)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _list(
    temperature_ptr,  # [B] fp32 or None, as the next
    min_p_ptr,  # [B] fp32
    high_ptr,  # [B, groups] fp32
    low_ptr,  # [B, S] fp32
    bit_ptr,  # [⌈B/rows⌉, groups] i32
    list_ptr,  # [⌈V/chunk⌉·chunk] i32, written: tokens in rising order, then V, in each chunk
    B,
    V,
    groups,
    S,
    temperature: tl.float32,
    min_p: tl.float32,
    rows: tl.constexpr,
    chunk: tl.constexpr,
    group: tl.constexpr,
    block_s: tl.constexpr,
):
    first = tl.program_id(0) * chunk
    o_n = first // group + tl.arange(0, chunk // group)
    o_s = tl.arange(0, block_s)
    b_open = tl.zeros((chunk // group,), tl.int32)
    for row0 in range(0, B, rows):
        o_b = row0 + tl.arange(0, rows)
        row = tl.minimum(o_b, B - 1).to(tl.int64)
        p_low = low_ptr + (row * S)[:, None] + o_s[None, :]
        b_low = tl.max(tl.load(p_low, mask=(o_s < S)[None, :], other=-float("inf")), 1)
        b_cut = b_low + _cut(temperature_ptr, min_p_ptr, temperature, min_p, row)
        p_high = high_ptr + (row * groups)[:, None] + o_n[None, :]
        b_high = tl.load(p_high, mask=(o_n < groups)[None, :], other=-float("inf"))
        m_open = tl.max((b_high >= b_cut[:, None]).to(tl.int32), 0) > 0
        b_bit = tl.load(bit_ptr + row0 // rows * groups + o_n, mask=o_n < groups, other=0)
        b_open |= tl.where(m_open, b_bit, 0)
    b_flag = (b_open[:, None] >> tl.arange(0, group)[None, :]) & 1
    b_flag = tl.reshape(b_flag, [chunk])
    o_v = tl.arange(0, chunk)
    b_place = tl.cumsum(b_flag, 0) - b_flag
    tl.store(list_ptr + first + b_place, first + o_v, mask=b_flag > 0)
    tl.store(list_ptr + first + o_v, V + tl.zeros_like(o_v), mask=o_v >= tl.sum(b_flag, 0))


def tile_shape(B: int) -> tuple[dict[str, int], int, int]:
    """A tile of `_screen`; warps and stages.

    p and s are read again for every tile, out of the second level: at 32 rows narrow ones would
    wait for that. Longer steps or more stages are more shared memory than a gfx942 has.
    """
    if B <= 16:
        return {"rows": 16, "block": 128, "step": 128}, 4, 3
    return {"rows": 32, "block": 256, "step": 64}, 8, 4


def possible_tokens(
    hidden: torch.Tensor,
    head: QuantizedLMHead,
    parameters: SamplingParameters,
    *,
    splits: int | None = None,
) -> torch.Tensor:
    """Launches the first three kernels, on the current device; arguments as in the next function.

    Returns:
        `[⌈V/1024⌉·1024]` int32: of every 1,024 tokens those that some row may keep, in rising
        order, then V.
    """
    (B, H), V = hidden.shape, len(head.codes)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    tile, warps, stages = tile_shape(B)
    blocks, n = triton.cdiv(B, tile["rows"]), triton.cdiv(V, tile["block"])
    groups, chunks = triton.cdiv(V, GROUP), triton.cdiv(V, CHUNK)
    S = min(n, splits or max(8, PROGRAMS // blocks))
    parts, of_rows = new(2, B, H, dtype=torch.int8), new(3, B)
    high, low, bits = new(B, groups), new(B, S), new(blocks, groups, dtype=torch.int32)
    listed = new(chunks * CHUNK, dtype=torch.int32)
    tensors, numbers = tensors_and_numbers(parameters.temperature, parameters.min_p)
    up = 1 + (H + 16) * 2.0**-23
    _parts[(B,)](
        hidden, parts, of_rows, H, hidden.stride(0), up, triton.next_power_of_2(H), num_warps=8
    )
    _screen[(blocks, S)](
        parts, of_rows, head.codes, head.scale, head.radius, head.length, *tensors,
        high, low, bits, B, V, H, n, groups, S, *numbers, group=GROUP, **tile,
        halves=hidden.dtype == torch.bfloat16, interpreted=not hidden.is_cuda,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _list[(chunks,)](
        *tensors, high, low, bits, listed, B, V, groups, S, *numbers,
        tile["rows"], CHUNK, GROUP, max(16, triton.next_power_of_2(S)), num_warps=16,
    )  # fmt: skip
    return listed


@on_its_device
def quantized_linear_sample(
    hidden: torch.Tensor,
    head: QuantizedLMHead,
    parameters: SamplingParameters,
    *,
    want: int = 0,
    splits: int | None = None,
) -> Sampled:
    """Launches the five kernels.

    Args:
        hidden: `[B, H]` of the weight's dtype, unit stride along H.
        head: of a weight with unit stride along H; on the device of `hidden`.
        parameters: of the rows, without top-k and top-p.
        want: 0.
        splits: of V, at most; None chooses. The result does not depend on it.
    """
    listed = possible_tokens(hidden, head, parameters, splits=splits) if len(hidden) else None
    return draw(hidden, (head.weight, None, 1.0, None), parameters, want=want, listed=listed)


_DATA = {
    **{"x_ptr": "*bf16", "part_ptr": "*i8", "code_ptr": "*i8", "bit_ptr": "*i32"},
    **dict.fromkeys(("row_ptr", "scale_ptr", "radius_ptr", "length_ptr"), "*fp32"),
    **dict.fromkeys(("temperature_ptr", "min_p_ptr", "high_ptr", "low_ptr"), "*fp32"),
    "list_ptr": "*i32",
    **dict.fromkeys(("B", "V", "H", "x_stride", "n", "groups", "S"), "i32"),
    **dict.fromkeys(("up", "temperature", "min_p"), "fp32"),
}


def screen_entry(B: int) -> tuple:
    """That of a call with B rows."""
    tile, warps, stages = tile_shape(B)
    fixed = {"group": GROUP, "halves": True, "interpreted": False}
    return _screen, _DATA, {**tile, **fixed}, warps, stages


AOT = [
    (_parts, _DATA, {"block_h": 4096}, 8, None),
    screen_entry(1),
    screen_entry(32),
    (_list, _DATA, {"rows": 32, "chunk": CHUNK, "group": GROUP, "block_s": 512}, 16, None),
]
