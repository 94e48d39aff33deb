"""A row's sampling parameters inside a kernel: from a `[B]` tensor, or a number all rows share."""

import triton
import triton.language as tl

GREEDY_BELOW = tl.constexpr(1e-3)
HIGHEST_TEMPERATURE = tl.constexpr(1e29)  # z + T·g of a finite z stays finite


@triton.jit
def row_value(ptr, value, row, dtype: tl.constexpr):
    """A row's parameter: from `[B]` if there is a tensor, else the number that all rows share."""
    if ptr is None:
        return tl.cast(value, dtype)
    else:
        return tl.load(ptr + row).to(dtype)


@triton.jit
def temperature_and_cut(temperature, min_p):
    """T and c = T·ln p_min, both 0 in greedy rows.

    Where one is NaN or out of range c is +inf: no token reaches max z + c.
    """
    greedy = temperature < GREEDY_BELOW
    usable = (temperature >= 0) & (temperature <= HIGHEST_TEMPERATURE)
    # Of another shape than T where one is a number: the interpreter joins no such bools.
    cuts = (min_p >= 0) & (min_p <= 1)
    c = tl.where(greedy, 0.0, temperature * tl.where(cuts, tl.log(min_p), 0.0))
    c = tl.where(usable, c, float("inf")) + tl.where(cuts, 0.0, float("inf"))
    return tl.where(usable, tl.where(greedy, 0.0, temperature), 0.0), c


@triton.jit
def row_parameters(
    temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
    temperature, min_p, seed, position, stream, stream_step, row,
):  # fmt: skip
    """T, c, seed, position and stream of a row, or of a block of rows."""
    T, c = temperature_and_cut(
        row_value(temperature_ptr, temperature, row, tl.float32),
        row_value(min_p_ptr, min_p, row, tl.float32),
    )
    row_seed = row_value(seed_ptr, seed, row, tl.int64)
    row_position = row_value(position_ptr, position, row, tl.int64)
    row_stream = row_value(stream_ptr, stream + row * stream_step, row, tl.int64)
    return T, c, row_seed, row_position, row_stream


TENSORS = {  # of a kernel's ahead-of-time signature, as the next
    **{"temperature_ptr": "*fp32", "min_p_ptr": "*fp32", "seed_ptr": "*i64"},
    **{"position_ptr": "*i64", "stream_ptr": "*i64"},
}
NUMBERS = {
    **{"temperature": "fp32", "min_p": "fp32", "seed": "i64", "position": "i64", "stream": "i64"},
    "stream_step": "i32",
}
