"""Hidden states to tokens: the Min-P draw on the tiles of the LM head's product.

    z[b, v] = softcap·tanh(scale·R(Σ_h x[b, h]·w[v, h] + bias[v]) / softcap)    (never in memory)
    token[b] = argmax_v z + T·g   over   z ≥ max z + c,    c = T·ln p_min

R rounds to the type of x and w, as of a product that is written: the logits, and so the token, are
those of `sample` behind one, up to the order of its sums.

    1. _tiles   grid [⌈B/rows⌉, S]  products of x [B, H] and w [V, H] in tiles [rows, block] through
                                    a split of V; what a tile leaves: kernels/candidates.py. Noise
                                    is drawn where a row reaches its split's own maximum + c
    2. _settle  grid [B]            joins what a row's tiles left; one that might hold a better
                                    token is multiplied again, in the same shape and the same order
                                    along H: its logits are the same bit for bit

Reads w once for all row blocks that run at the same time, and x once a tile, out of the second
level. Writes 24 bytes a row and tile, 28 with the logprob: a fifth of a byte a logit.

fp32 operands are multiplied in fp32 (not TF32): a tie must not depend on the unit.
"""

import torch
import triton
import triton.language as tl

from autodeco_fast.sampling import (
    FULL_LOGPROB,
    Sampled,
    SamplingParameters,
    stream_and_step,
    tensors_and_numbers,
)

from .candidates import best_candidate, best_of_rows, next_open, whole_logprob
from .device import on_its_device
from .lm_head_tiles import DEPTH_FP32, DEPTH_H, product_tile, row_of_tile, step_of, token_ids
from .logit_tiles import LOWEST, finite
from .philox import SAMPLE_DOMAIN, gumbel, gumbel_of_ids
from .row_parameters import GREEDY_BELOW, NUMBERS, TENSORS, row_parameters

# x is read again for every tile, out of the second level: narrower ones would wait for that.
BLOCK = 128
PROGRAMS = 264  # two for each multiprocessor of an H100
AMD = torch.version.hip is not None


@triton.jit
def _scores(
    b_z, b_least, T, seed, position, stream, list_ptr, tile, rows: tl.constexpr, block: tl.constexpr
):
    """z + T·g of a tile's tokens ≥ least, as are T … stream of a row; −inf elsewhere."""
    seed, position, stream = seed[:, None], position[:, None], stream[:, None]
    if list_ptr is None:
        o_g = tile * (block // 4) + tl.arange(0, block // 4)
        o_g = o_g[None, :] + tl.zeros((rows, 1), tl.int32)
        b_g = gumbel(seed, position, stream, o_g, [rows, block], SAMPLE_DOMAIN)
    else:
        o_v = token_ids(list_ptr, tile, block)[None, :] + tl.zeros((rows, 1), tl.int32)
        b_g = gumbel_of_ids(seed, position, stream, o_v, SAMPLE_DOMAIN)
    m_kept = (b_z >= b_least[:, None]) & (b_z > -float("inf"))
    return tl.where(m_kept, b_z + T[:, None] * b_g, -float("inf"))


@triton.jit
def _maximum(b_x, size: tl.constexpr):
    """Of `[size]`. Doubled, because Triton 3.7 fails on a plain one here when it compiles for
    sm_100."""
    return tl.max(tl.reshape(tl.join(b_x, b_x), [2 * size]), 0)


_UNSPECIALIZED = ["B", "n", "depth", "scale", *NUMBERS]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _tiles(
    x_ptr,  # [B, H] any float, row stride x_stride
    w_ptr,  # [V, H] of the same type, row stride w_stride
    bias_ptr,  # [V] any float, or None
    temperature_ptr,  # [B] fp32 or None, as the next four
    min_p_ptr,  # [B] fp32
    seed_ptr,  # [B] i64
    position_ptr,  # [B] i64
    stream_ptr,  # [B] i64
    float_ptr,  # [6, B, n] fp32, written, as the next: kernels/candidates.py
    code_ptr,  # [B, n] i32
    list_ptr,  # [n·block] i32: tiles' tokens, in rising order, V for none; or None for all
    B,
    V,
    H,
    x_stride,
    w_stride,
    n,  # tiles of V, or of the list
    depth,  # tiles a split
    scale,
    softcap,
    temperature: tl.float32,
    min_p: tl.float32,
    seed: tl.int64,
    position: tl.int64,
    stream: tl.int64,
    stream_step,
    rows: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
    upcast: tl.constexpr,
    whole_mass: tl.constexpr,
):
    row0 = tl.program_id(0) * rows
    o_b = row0 + tl.arange(0, rows)
    m_b = o_b < B
    row = tl.minimum(o_b, B - 1).to(tl.int64)
    zero = tl.zeros((rows,), tl.float32)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    whole = zero.to(tl.int64)  # numbers become blocks
    T, c = zero + T, zero + c
    row_seed, row_position = whole + row_seed, whole + row_position
    row_stream = whole + row_stream
    none = zero - float("inf")
    b_max = none
    plane = tl.cast(B, tl.int64) * n
    first = tl.program_id(1) * depth
    for tile in range(first, tl.minimum(first + depth, n)):
        b_z = product_tile(
            x_ptr, w_ptr, bias_ptr, row0, tile, B, V, H, x_stride, w_stride, scale, softcap,
            rows, block, step, upcast, list_ptr, rounded=True,
        )  # fmt: skip
        b_code = tl.max((b_z != b_z).to(tl.int32), 1) << 16
        b_code |= tl.max((b_z == float("inf")).to(tl.int32), 1) << 17
        b_z = finite(b_z)
        b_top = tl.max(b_z, 1)
        b_max = tl.maximum(b_max, b_top)
        b_least = b_max + c
        m_live = m_b & (b_top >= b_least) & (b_top > -float("inf"))
        b_s1, b_z1, b_s2, b_z2 = none, none, none, none
        if _maximum(m_live.to(tl.int32), rows) > 0:
            b_s = _scores(
                b_z, b_least, T, row_seed, row_position, row_stream, list_ptr, tile, rows, block
            )
            b_s1, b_z1, b_at1 = best_of_rows(b_s, b_z, block)
            b_s = tl.where(b_z > b_z1[:, None], b_s, -float("inf"))
            b_s2, b_z2, b_at2 = best_of_rows(b_s, b_z, block)
            b_code |= b_at1 | (b_at2 << 8)
        o = row * n + tile
        tl.store(float_ptr + o, b_top, mask=m_b)
        tl.store(float_ptr + plane + o, b_s1, mask=m_b)
        tl.store(float_ptr + 2 * plane + o, b_z1, mask=m_b)
        tl.store(float_ptr + 3 * plane + o, b_s2, mask=m_b)
        tl.store(float_ptr + 4 * plane + o, b_z2, mask=m_b)
        tl.store(code_ptr + o, b_code, mask=m_b)
        if whole_mass:
            b_x = (b_z - tl.maximum(b_top, LOWEST)[:, None]) / tl.maximum(T, GREEDY_BELOW)[:, None]
            tl.store(float_ptr + 5 * plane + o, tl.sum(tl.exp(b_x), 1), mask=m_b)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _settle(
    x_ptr,  # [B, H]
    w_ptr,  # [V, H]
    bias_ptr,  # [V] or None
    temperature_ptr,  # [B] fp32 or None, as the next four
    min_p_ptr,
    seed_ptr,
    position_ptr,
    stream_ptr,
    float_ptr,  # [6, B, n] fp32
    code_ptr,  # [B, n] i32
    list_ptr,  # [n·block] i32 or None
    token_ptr,  # [B] i64, written
    status_ptr,  # [B] i32, written
    full_logprob_ptr,  # [B] fp32, written, or None
    B,
    V,
    H,
    x_stride,
    w_stride,
    n,
    depth,
    scale,
    softcap,
    temperature: tl.float32,
    min_p: tl.float32,
    seed: tl.int64,
    position: tl.int64,
    stream: tl.int64,
    stream_step,
    rows: tl.constexpr,
    block: tl.constexpr,
    step: tl.constexpr,
    upcast: tl.constexpr,
    block_n: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    T, c, row_seed, row_position, row_stream = row_parameters(
        temperature_ptr, min_p_ptr, seed_ptr, position_ptr, stream_ptr,
        temperature, min_p, seed, position, stream, stream_step, row,
    )  # fmt: skip
    m, tau, score, winner, logit, flag = best_candidate(
        float_ptr, code_ptr, row, n, c, block, block_n
    )
    claim, tile = next_open(float_ptr, row, n, tau, float("inf"), -1, block_n)
    row0 = tl.program_id(0) // rows * rows
    m_row = row0 + tl.arange(0, rows) == tl.program_id(0)
    while (claim >= score) & (claim > -float("inf")):
        b_z = product_tile(
            x_ptr, w_ptr, bias_ptr, row0, tile, B, V, H, x_stride, w_stride, None, None,
            rows, block, step, upcast, list_ptr,
        )  # fmt: skip
        o_v = token_ids(list_ptr, tile, block)
        b_z = row_of_tile(b_z, m_row, o_v, V, scale, softcap, x_ptr.dtype.element_ty, upcast)
        b_z = finite(b_z)
        b_g = gumbel_of_ids(row_seed, row_position, row_stream, o_v, SAMPLE_DOMAIN)
        m_kept = (b_z >= tau) & (b_z > -float("inf"))
        b_s = tl.where(m_kept, b_z + T * b_g, -float("inf"))
        s, o_v = _maximum(b_s, block), tile * block + tl.arange(0, block)
        at = -_maximum(tl.where(b_s == s, -o_v, -2147483647), block)
        if (s > score) | ((s == score) & (at < winner)):
            score, winner = s, at
            logit = _maximum(tl.where(o_v == at, b_z, -float("inf")), block)
        claim, tile = next_open(float_ptr, row, n, tau, claim, tile, block_n)
    alive = m > -float("inf")
    if list_ptr is not None:  # places so far, which rise as ids do
        winner = tl.load(list_ptr + winner, mask=score > -float("inf"), other=0)
    tl.store(token_ptr + row, tl.where(alive, winner, 0).to(tl.int64))
    wrong = tau == float("inf")
    tl.store(status_ptr + row, flag + tl.where(alive, 0, 4) + tl.where(wrong, 8, 0))
    if full_logprob_ptr is not None:
        T = tl.where(wrong, 0.0, T)
        tl.store(full_logprob_ptr + row, whole_logprob(float_ptr, row, n, m, T, logit, block_n))


def tile_shape(
    B: int, *, listed: bool = False, amd: bool = AMD, element_size: int = 2
) -> tuple[int, int, int]:
    """Rows of a tile, 16 at least for the matrix unit and 64 at most, 32 in fp32, which has no such
    unit and would spill; warps; stages.

    Noise of ids that are no neighbours, of listed tokens, takes more registers. Warps share
    columns, none shares a sum, so a logit does not depend on their number. A gfx942's have 64
    lanes: at 32 rows eight of them spill. Four stages of 64 rows are more shared memory than it
    has. Of the rare path, `_settle`, some variants spill 8 to 32 bytes a thread, because the
    compiler saves registers to hold more programs: tests/test_resources.py.
    """
    rows = min(64 if element_size == 2 else 32, max(16, triton.next_power_of_2(B)))
    few = rows < 64 if amd else rows == 16 and not listed
    return rows, 4 if few else 8, 3 if rows == 64 else 4


def splits_of(
    B: int, V: int, splits: int | None = None, *, element_size: int = 2
) -> tuple[int, int]:
    """Splits of V, at most `splits`, and tiles in each."""
    tiles = triton.cdiv(V, BLOCK)
    rows, *_ = tile_shape(B, element_size=element_size)
    splits = splits or max(8, PROGRAMS // triton.cdiv(B, rows))
    depth = triton.cdiv(tiles, min(tiles, splits))
    return triton.cdiv(tiles, depth), depth


@on_its_device
def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    parameters: SamplingParameters,
    *,
    want: int = 0,
    splits: int | None = None,
) -> Sampled:
    """Launches the two kernels.

    Args:
        hidden: `[B, H]` bf16, fp16 or fp32, unit stride along H.
        weight: `[V, H]` of the same dtype, unit stride along H.
        bias: `[V]` or None.
        parameters: of the rows, without top-k and top-p.
        want: FULL_LOGPROB, or 0.
        splits: of V, at most; None chooses. The result does not depend on it.
    """
    lm_head = weight, bias, logit_scale, softcap
    return draw(hidden, lm_head, parameters, want=want, splits=splits)


def draw(
    hidden: torch.Tensor,
    lm_head: tuple[torch.Tensor, torch.Tensor | None, float, float | None],
    parameters: SamplingParameters,
    *,
    want: int = 0,
    splits: int | None = None,
    listed: torch.Tensor | None = None,
) -> Sampled:
    """The same on the current device, with arguments as in `linear_sample`.

    Args:
        lm_head: weight, bias, scale and softcap.
        listed: `[n·BLOCK]` int32, the only tokens that count, in rising order within which V stands
            for none.
    """
    weight, bias, logit_scale, softcap = lm_head
    B, H = hidden.shape
    V = weight.shape[0]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    full_logprob = new(B) if want & FULL_LOGPROB else None
    token, status = new(B, dtype=torch.int64), new(B, dtype=torch.int32)
    out = Sampled(token, status, full_logprob=full_logprob)
    if B == 0:
        return out
    size = hidden.element_size()
    rows, warps, stages = tile_shape(B, listed=listed is not None, element_size=size)
    if listed is None:
        (S, depth), n = splits_of(B, V, splits, element_size=size), triton.cdiv(V, BLOCK)
    else:
        S, depth, n = len(listed) // BLOCK, 1, len(listed) // BLOCK
    block_n = max(16, triton.next_power_of_2(n))
    floats, codes = new(6, B, n), new(B, n, dtype=torch.int32)
    p = parameters
    stream, stream_step = stream_and_step(p.stream)
    tensors, numbers = tensors_and_numbers(p.temperature, p.min_p, p.seed, p.position, stream)
    data = hidden, weight, bias, *tensors, floats, codes, listed
    scalars = (
        B, V, H, hidden.stride(0), weight.stride(0), n, depth, logit_scale, softcap,
        *numbers, stream_step,
        rows, BLOCK, step_of(hidden), hidden.dtype == torch.bfloat16 and not hidden.is_cuda,
    )  # fmt: skip
    _tiles[(triton.cdiv(B, rows), S)](
        *data, *scalars, full_logprob is not None, num_warps=warps, num_stages=stages
    )
    _settle[(B,)](
        *data, token, status, full_logprob, *scalars, block_n,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


_DATA = {
    **dict.fromkeys(("x_ptr", "w_ptr"), "*bf16"),
    **TENSORS,
    **{"float_ptr": "*fp32", "code_ptr": "*i32", "token_ptr": "*i64", "status_ptr": "*i32"},
    **dict.fromkeys(("B", "V", "H", "x_stride", "w_stride", "n", "depth"), "i32"),
    "scale": "fp32",
    **NUMBERS,
}
_FIXED = {"bias_ptr": None, "softcap": None, "block": BLOCK, "step": DEPTH_H, "upcast": False}
_NVIDIA = "sm_80", "sm_90", "sm_100"
_OPTIONS = {  # of a call → the argument that is None without it
    "bias": ("bias_ptr", "*bf16"),
    "softcap": ("softcap", "fp32"),
    "logprob": ("full_logprob_ptr", "*fp32"),
}


def aot_entry(
    kernel,
    B: int,
    *targets: str,
    listed: bool = False,
    element_size: int = 2,
    options: tuple[str, ...] = (),
) -> tuple:
    """That of a call with B rows, which only have a temperature and Min-P beside these options."""
    amd = "gfx942" in targets
    rows, warps, stages = tile_shape(B, listed=listed, amd=amd, element_size=element_size)
    data = {**_DATA, "list_ptr": "*i32"} if listed else {**_DATA}
    own = {"whole_mass": False} if kernel is _tiles else {"full_logprob_ptr": None, "block_n": 2048}
    fixed = {**_FIXED, **own, "rows": rows} | ({} if listed else {"list_ptr": None})
    for name, kind in (_OPTIONS[option] for option in options):
        del fixed[name]
        data[name] = kind
    if element_size == 4:
        data = {name: "*fp32" if kind == "*bf16" else kind for name, kind in data.items()}
        fixed["step"] = DEPTH_FP32
    return kernel, data, fixed, warps, stages, *targets


AOT = [
    aot_entry(kernel, B, *targets, listed=listed)
    for kernel, listed, rows in (
        *((_tiles, False, (1, 32, 64)), (_tiles, True, (1, 32))),
        *((_settle, False, (1, 32, 64)), (_settle, True, (1, 32))),
    )
    for B in rows
    for targets in (_NVIDIA, ("gfx942",))
]
AOT += [
    aot_entry(kernel, B, *targets, element_size=size, options=options)
    for kernel, B, size, options in (
        *((_tiles, 64, 4, ()), (_settle, 64, 4, ())),
        *((_settle, 1, 4, ()), (_settle, 1, 4, ("bias",)), (_settle, 32, 2, (*_OPTIONS,))),
    )
    for targets in (_NVIDIA, ("gfx942",))
]
