"""`token_stats`: statistics of an LM head's product that is never kept."""

from collections.abc import Iterator, Sequence

import torch

from autodeco_fast.backends import implementation, is_hopper, resolve
from autodeco_fast.lm_head import multiply, rows_of_chunk
from autodeco_fast.numerics import ALL_FLOATS
from autodeco_fast.ops.checks import (
    FINITE,
    SIZE,
    check_integer,
    check_number,
    check_product,
    check_softcap,
    check_target,
    row_parameter,
    unit_stride,
)
from autodeco_fast.ops.logit_stats import (
    check_temperature,
    columns_of,
    fake_row_sums,
    statistics,
)
from autodeco_fast.stats import IGNORED, RowSums, TokenStats, scatter

CHUNK_BYTES = 129 << 20  # 256 rows of the widest vocabularies, 262,208, in bf16


def streaming_pays(backend: str, hidden: torch.Tensor, *, scaled: bool) -> bool:
    """Whether the streaming design is chosen over the vendor's product in chunks.

    Triton, on an H100 in bf16 without a temperature (`bench/results/h100-80gb-hbm3`): 0.6 to 0.9
    times the time of chunks at 2,048 rows, 1.2 times at 8,192, but 0.8 where H = 896. The
    rest, and with a temperature, is not measured: chunks.

    torch: yes. Tiles that stay in the caches beat rows that do not
    (`bench/end_to_end/training.py`).
    """
    if backend == "torch":
        return True
    measured = is_hopper(hidden.get_device()) and hidden.element_size() == 2 and not scaled
    return measured and (hidden.shape[0] <= 4096 or hidden.shape[1] <= 1024)


def streams(
    fused: bool | None, backend: str, hidden: torch.Tensor, temperature: torch.Tensor | None
) -> bool:
    """The design of a whole call, asked for or chosen: every product of it is rounded alike."""
    if fused is not None:
        return fused
    return streaming_pays(backend, hidden, scaled=temperature is not None)


@torch.library.custom_op("autodeco_fast::token_stats", mutates_args=())
def _token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    cut: bool,
    chunk_bytes: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums; `chunk_bytes` of logits at a time, or 0 for the streaming design.

    Ignored rows are left out, but for a CUDA graph that is being captured: how many there are is on
    the device, and the host may not wait for it.
    """
    streaming = implementation(backend, "token_stats")
    of_rows = hidden, column, threshold, inverse_temperature
    if chunk_bytes == 0 and backend == "torch":  # leaves ignored rows out itself
        return streaming(hidden, weight, *of_rows[1:], bias, logit_scale, softcap, cut)
    valid = None if _capturing(hidden) else (column != IGNORED).nonzero()[:, 0]
    if valid is not None:
        of_rows = [None if x is None else x[valid] for x in of_rows]
    if chunk_bytes == 0:
        h, *parameters = of_rows
        sums = [streaming(h, weight, *parameters, bias, logit_scale, softcap, cut)]
    else:
        from_logits = implementation(backend, "logit_stats")
        sums = [
            from_logits(logits, *parameters, logit_scale, softcap, cut)
            for logits, parameters in _chunks(of_rows, weight, bias, chunk_bytes)
        ]
    if valid is not None:
        return scatter(valid, sums, len(column), hidden, inverse_temperature is not None)
    floats, ints = (torch.cat(chunks, 1) for chunks in zip(*sums))
    ignored = column == IGNORED
    floats.masked_fill_(ignored, 0.0)
    ints[0].masked_fill_(ignored, 0)
    ints[1].masked_fill_(ignored, -1)
    return floats, ints


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _chunks(
    of_rows: Sequence[torch.Tensor | None],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    chunk_bytes: int,
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor | None]]]:
    """Logits of chunks of rows, from the vendor's product into one buffer, with the rows' column,
    threshold and 1/T."""
    hidden, (V, N) = of_rows[0], (len(weight), len(of_rows[0]))
    chunk = rows_of_chunk(chunk_bytes, weight, N)
    buffer = hidden.new_empty(chunk * V)
    for start in range(0, max(1, N), chunk):
        h, *parameters = (None if x is None else x[start : start + chunk] for x in of_rows)
        yield multiply(h, weight, bias, buffer), parameters


@_token_stats.register_fake
def _(
    hidden,
    weight,
    column,
    threshold,
    inverse_temperature,
    bias,
    logit_scale,
    softcap,
    cut,
    chunk_bytes,
    backend,
):
    return fake_row_sums(hidden, column, inverse_temperature)


def row_sums_of_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    *,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    chunk_bytes: int,
    fused: bool,
    backend: str,
    cut: bool = False,
) -> RowSums:
    """The op, its arguments put in order."""
    chunk_bytes = check_integer("chunk_bytes", chunk_bytes, SIZE)
    return _token_stats(
        unit_stride(hidden),
        unit_stride(weight),
        column,
        row_parameter(threshold, hidden),
        row_parameter(inverse_temperature, hidden),
        None if bias is None else bias.detach().contiguous(),
        check_number("logit_scale", logit_scale, FINITE),
        check_softcap(softcap),
        cut,
        0 if fused else chunk_bytes,
        backend,
    )


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: torch.Tensor | None = None,
    min_p: float | None = None,
    cut: bool = False,
    ignore_index: int = -100,
    fused: bool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of `z = softcap·tanh(logit_scale·(hidden @ weight.T + bias) / softcap)`, never
    holding `[N, V]`.

    Ignored rows are not multiplied: on a GPU the host waits for their number. While a CUDA graph is
    captured it may not, and the Triton backend multiplies them, too, and masks them; the torch
    backend cannot be captured. Differentiable in the temperature only: the base model is frozen.

    Args:
        hidden: `[N, H]` what enters the output embedding, bf16, fp16 or fp32 (fp64 on the torch
            backend).
        weight: `[V, H]` of the same dtype, a plain tensor.
        target: `[N]` int64 ids, `ignore_index` where there is none.
        bias: `[V]` or None.
        logit_scale, softcap: in this order, after the bias.
        temperature: `[N]`, for the fields at a temperature; raised to 0.01 where lower. NaN or inf
            gives NaN there.
        min_p: in [0, 1], for `kept`: a second product.
        cut: as in `logit_stats`.
        fused: True streams through tiles of the product; False writes chunks of logits and reads
            them back; None chooses.
        chunk_bytes: of one such chunk.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes or numbers other than these.
        RuntimeError: as `logit_stats`.
    """
    check_product(hidden, weight, bias, ALL_FLOATS)
    chosen = resolve(backend, hidden, weight)
    check_target(target, hidden, weight.shape[0], ignore_index)
    min_p = check_temperature(temperature, min_p, hidden, cut)
    # Once for both sweeps: a cut is only good for logits that were rounded as its maximum was.
    fused = streams(fused, chosen, hidden, temperature)

    def sums_of(column, threshold, inverse_temperature, cut):
        return row_sums_of_product(
            hidden,
            weight,
            column,
            threshold,
            inverse_temperature,
            bias=bias,
            logit_scale=logit_scale,
            softcap=softcap,
            chunk_bytes=chunk_bytes,
            fused=fused,
            backend=chosen,
            cut=cut,
        )

    column = columns_of(target, weight.shape[0], ignore_index)
    return statistics(sums_of, column, temperature, min_p, cut)
