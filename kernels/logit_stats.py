"""Row statistics of logits in one read: of a rank's columns of the vocabulary, or of all of them.

    z = softcap·tanh(scale·x / softcap)                     (no softcap: z = scale·x)
    m = max z,  argmax: lowest id on ties
    count = |{i ≠ y: z_i > threshold}|,  threshold = z_y unless given
    s = Σ e^{z−m},  t = Σ e^{z−m}(z−m)
    with temperatures, for x = (z − m)/T:  Σ e^x,  Σ e^x x,  Σ e^x x²
    cut: these three over {i: z_i > threshold} alone, and s = t = 0: sums of a kept set

One program a row; ignored rows are not read: 0 everywhere, count −1. Full tiles are copied ahead of
their sums. A tile is seen as [lanes, width], where a lane is what a thread reads in one word, and
each lane carries a maximum and sums of its own: threads never wait for each other on the way. When
a lane's m grows by −d, s ← e^d s, t ← e^d (t + d s), q ← e^d (q + 2 d t + d² s); at the end all
lanes are brought to the row's m the same way. A lane remembers in which tile its maximum came
first, and the argmax is looked for in that one word.

Reads N·V elements, writes 32 or 44 bytes a row. `autodeco_fast/stats.py` makes logsumexp, rank,
entropy and moments of it.
"""

import torch
import triton
import triton.language as tl

from .device import on_its_device
from .extrema import at_least
from .lm_head_tiles import exp, transform

BLOCK = 4096  # logits of a tile
WARPS = 8
WORD = 16  # bytes of the widest load, at most
IGNORED = tl.constexpr(-2)
LOWEST_X = tl.constexpr(-1e18)  # e^x is 0 there, and 0·x² too


@triton.jit
def moved(d, b_s, b_t, b_q):
    """Sums of x⁰, x¹ and x² after x grew by d ≤ 0."""
    d = at_least(d, -1e9)  # its square is finite
    decay = exp(d)
    return decay * b_s, decay * (b_t + d * b_s), decay * (b_q + d * (2.0 * b_t + d * b_s))


@triton.jit
def _grown(b_m, b_new):
    """What z − m grows by, and the new m; 0 and 0 where nothing but −inf was seen: sums are 0 there
    and any finite numbers will do."""
    b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
    return tl.where(b_m == -float("inf"), 0.0, b_m - b_safe), b_safe


@triton.jit
def _take(
    b_z, tile, threshold, inverse, b_m, b_tile, b_count, b_s, b_t, b_u, b_a, b_q,
    scaled: tl.constexpr, cut: tl.constexpr,
):  # fmt: skip
    """Takes a tile of logits `[lanes, width]` into the lanes' maxima and sums."""
    b_top = tl.max(b_z, 1)
    b_tile = tl.where(b_top > b_m, tile, b_tile)
    b_new = tl.maximum(b_m, b_top)
    b_d, b_safe = _grown(b_m, b_new)
    b_x = b_z - b_safe[:, None]
    b_above = b_z > threshold
    b_count += tl.sum(b_above.to(tl.int32), 1)
    if not cut:
        b_e = exp(b_x)
        b_s, b_t, _ = moved(b_d, b_s, b_t, 0.0)
        b_s += tl.sum(b_e, 1)
        b_t += tl.sum(b_e * tl.maximum(b_x, LOWEST_X), 1)
    if scaled:
        b_x *= inverse
        b_e = exp(b_x)
        if cut:
            b_e = tl.where(b_above, b_e, 0.0)
        b_x = tl.maximum(b_x, LOWEST_X)
        b_u, b_a, b_q = moved(b_d * inverse, b_u, b_a, b_q)
        b_u += tl.sum(b_e, 1)
        b_a += tl.sum(b_e * b_x, 1)
        b_q += tl.sum(b_e * b_x * b_x, 1)
    return b_new, b_tile, b_count, b_s, b_t, b_u, b_a, b_q


@triton.jit
def _logits(p_x, o_v, V, scale, softcap):
    """z of some columns; −inf beyond V, after the transform: softcap·tanh(−inf) is not −inf."""
    b_x = tl.load(p_x + o_v, mask=o_v < V, other=0.0).to(tl.float32)
    return tl.where(o_v < V, transform(b_x, scale, softcap), -float("inf"))


@triton.jit(do_not_specialize=["N"])
def _logit_stats(
    x_ptr,  # [N, V] any float, row stride `stride`
    column_ptr,  # [N] i64: the target's column, −1 if another part has it, −2 if the row is ignored
    threshold_ptr,  # [N] fp32, or None: the target's logit, which then is here
    inverse_ptr,  # [N] fp32: 1/T, or None
    float_ptr,  # [4 or 7, N] fp32, written
    int_ptr,  # [2, N] i64, written
    N,
    V,
    stride,
    scale,
    softcap,
    cut: tl.constexpr,
    block: tl.constexpr,
    width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + row * stride
    column = tl.load(column_ptr + row).to(tl.int32)
    scaled: tl.constexpr = inverse_ptr is not None
    inverse = tl.load(inverse_ptr + row) if inverse_ptr is not None else 1.0
    lanes: tl.constexpr = block // width
    b_zero = tl.zeros((lanes,), tl.float32)
    b_m, b_s, b_t, b_u, b_a, b_q = b_zero - float("inf"), b_zero, b_zero, b_zero, b_zero, b_zero
    b_tile, b_count = tl.zeros((lanes,), tl.int32), tl.zeros((lanes,), tl.int32)
    m = 0.0
    z_y = 0.0
    best = 0
    count = -1
    if column != IGNORED:
        z_y = -float("inf")
        if column >= 0:
            z_y = transform(tl.load(p_x + column).to(tl.float32), scale, softcap)
        threshold = tl.load(threshold_ptr + row) if threshold_ptr is not None else z_y
        o_block = tl.arange(0, block)
        full = V // block
        for tile in tl.range(0, full, num_stages=4):
            b_x = tl.load(p_x + tile * block + o_block).to(tl.float32)
            b_z = tl.reshape(transform(b_x, scale, softcap), [lanes, width])
            b_m, b_tile, b_count, b_s, b_t, b_u, b_a, b_q = _take(
                b_z, tile, threshold, inverse, b_m, b_tile, b_count, b_s, b_t, b_u, b_a, b_q,
                scaled, cut,
            )  # fmt: skip
        if full * block < V:
            b_z = _logits(p_x, full * block + o_block, V, scale, softcap)
            b_z = tl.reshape(b_z, [lanes, width])
            b_m, b_tile, b_count, b_s, b_t, b_u, b_a, b_q = _take(
                b_z, full, threshold, inverse, b_m, b_tile, b_count, b_s, b_t, b_u, b_a, b_q,
                scaled, cut,
            )  # fmt: skip
        m = tl.max(b_m, 0)
        b_d, _ = _grown(b_m, tl.zeros((lanes,), tl.float32) + m)
        b_s, b_t, _ = moved(b_d, b_s, b_t, 0.0)
        b_u, b_a, b_q = moved(b_d * inverse, b_u, b_a, b_q)
        # The target's own column is in the sums of a cut, and not in its rank.
        count = tl.sum(b_count, 0) - ((column >= 0) & (z_y > threshold)).to(tl.int32)
        b_first = b_tile * block + tl.arange(0, lanes) * width
        first = tl.min(tl.where((b_m == m) & (b_m > -float("inf")), b_first, V - 1), 0)
        b_z = _logits(p_x, first + tl.arange(0, width), V, scale, softcap)
        _, at = tl.max(b_z, 0, return_indices=True)
        best = tl.where(m > -float("inf"), tl.minimum(first + at, V - 1), 0)
    tl.store(float_ptr + row, m)
    tl.store(float_ptr + N + row, z_y)
    tl.store(float_ptr + 2 * N + row, tl.sum(b_s, 0))
    tl.store(float_ptr + 3 * N + row, tl.sum(b_t, 0))
    if scaled:
        tl.store(float_ptr + 4 * N + row, tl.sum(b_u, 0))
        tl.store(float_ptr + 5 * N + row, tl.sum(b_a, 0))
        tl.store(float_ptr + 6 * N + row, tl.sum(b_q, 0))
    tl.store(int_ptr + row, best.to(tl.int64))
    tl.store(int_ptr + N + row, count.to(tl.int64))


@on_its_device
def logit_stats(
    logits: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    cut: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches one program a row.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32, unit stride along V.
        column: `[N]` int64: the target's column in `[0, V)`, −1 if another rank has it,
            −2 in ignored rows.
        threshold: `[N]` fp32 that ranks count against, or None for the target's logit (then no
            column is −1).
        inverse_temperature: `[N]` fp32 or None.
        scale, softcap: the transform; `softcap=None` leaves it out.
        cut: whether the sums at a temperature are those of logits above the threshold; the others
            are 0 then.

    Returns:
        floats `[4 or 7, N]` fp32 and ints `[2, N]` int64, as in `autodeco_fast/stats.py`.
    """
    N, V = logits.shape
    block = min(BLOCK, max(16, triton.next_power_of_2(V)))
    floats = torch.empty(
        4 if inverse_temperature is None else 7, N, dtype=torch.float32, device=logits.device
    )
    ints = torch.empty(2, N, dtype=torch.int64, device=logits.device)
    if N:
        _logit_stats[(N,)](
            logits, column, threshold, inverse_temperature, floats, ints, N, V, logits.stride(0),
            None if scale == 1.0 else float(scale), softcap, cut, block,
            WORD // logits.element_size(), num_warps=WARPS,
        )  # fmt: skip
    return floats, ints


_SIGNATURE = {
    **{"x_ptr": "*bf16", "column_ptr": "*i64", "float_ptr": "*fp32", "int_ptr": "*i64"},
    **{"N": "i32", "V": "i32", "stride": "i32"},
}
_SCALED = {**_SIGNATURE, "inverse_ptr": "*fp32", "scale": "fp32", "softcap": "fp32"}
_TILE = {"block": BLOCK, "width": WORD // 2}
_WHOLE = {"threshold_ptr": None, "cut": False, **_TILE}
AOT = [
    (
        _logit_stats,
        _SIGNATURE,
        {**_WHOLE, **dict.fromkeys(("inverse_ptr", "scale", "softcap"))},
        WARPS,
        None,
    ),
    (_logit_stats, _SCALED, _WHOLE, WARPS, None),
    (_logit_stats, {**_SCALED, "threshold_ptr": "*fp32"}, {"cut": True, **_TILE}, WARPS, None),
]
