"""`token_stats`: statistics of an LM head's product that is never kept."""

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.ops.checks import (
    ALL_FLOATS,
    FINITE,
    SIZE,
    check_integer,
    check_number,
    check_product,
    check_softcap,
    check_target,
)
from autodeco_fast.ops.logit_stats import (
    TokenStats,
    check_temperature,
    fake_part,
    row_dtype,
    statistics,
)
from autodeco_fast.stats import IGNORED, Part
from autodeco_fast.torch_backend import logit_stats as torch_backend

CHUNK_BYTES = 128 << 20


def streaming_pays(backend: str) -> bool:
    """Whether the streaming design is chosen over the vendor's product in chunks.

    Triton: no. By the model of `bench/roofline.py` a chunk's trip to memory and back costs `4·N·V`
        bytes, 9 % of the product at
    H = 4096, while 128 × 128 tiles wait for the second-level cache: 2.5 times the time of chunks,
    1.9 times in the kernel's variant for Hopper. Streaming saves the chunk's memory, nothing else.
    Predicted, not measured on a GPU.

    torch: yes. Tiles that stay in the caches beat rows that do not (`bench/training.py`).
    """
    return backend == "torch"


def _backend(backend: str):
    """(streaming, rows of logits) of a backend."""
    if backend == "torch":
        return torch_backend.token_stats, torch_backend.logit_stats
    from autodeco_fast.kernels.logit_stats import logit_stats
    from autodeco_fast.kernels.token_stats import token_stats

    return token_stats, logit_stats


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
    chunk_bytes: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part; `chunk_bytes` of logits at a time, or 0 for the streaming design.

    Ignored rows are left out, but for a CUDA graph that is being captured: how many there are is on
    the device, and the host may not wait for it.
    """
    streaming, rows_of = _backend(backend)
    if chunk_bytes == 0 and backend == "torch":  # leaves ignored rows out itself
        return streaming(
            hidden, weight, column, threshold, inverse_temperature, bias, logit_scale, softcap
        )
    rows = hidden, column, threshold, inverse_temperature
    valid = None if _capturing(hidden) else (column != IGNORED).nonzero()[:, 0]
    if valid is not None:
        rows = [None if x is None else x[valid] for x in rows]
    if chunk_bytes == 0:
        h, *per_row = rows
        parts = [streaming(h, weight, *per_row, bias, logit_scale, softcap)]
    else:
        parts = _chunked(*rows, weight, bias, logit_scale, softcap, chunk_bytes, rows_of)
    if valid is not None:
        return torch_backend.scatter(
            valid, parts, len(column), hidden, inverse_temperature is not None
        )
    floats, ints = (torch.cat(pieces, 1) for pieces in zip(*parts))
    ignored = column == IGNORED
    floats.masked_fill_(ignored, 0.0)
    ints[0].masked_fill_(ignored, 0)
    ints[1].masked_fill_(ignored, -1)
    return floats, ints


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _chunked(
    hidden, column, threshold, inverse, weight, bias, logit_scale, softcap, chunk_bytes, rows_of
) -> list[Part]:
    """Parts of chunks of rows, each from the vendor's product."""
    V, N = len(weight), len(column)
    chunk = min(max(1, chunk_bytes // (V * hidden.element_size())), max(1, N))
    block = torch.empty(chunk * V, dtype=hidden.dtype, device=hidden.device)
    parts = []
    for start in range(0, max(1, N), chunk):
        here = slice(start, start + chunk)
        per_row = [None if x is None else x[here] for x in (column, threshold, inverse)]
        parts.append(
            rows_of(
                torch_backend.multiply(hidden[here], weight, bias, block),
                *per_row,
                logit_scale,
                softcap,
            )
        )
    return parts


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
    chunk_bytes,
    backend,
):
    return fake_part(hidden, column, inverse_temperature)


def product_part(
    hidden, weight, column, threshold, inverse, bias, logit_scale, softcap, chunk_bytes, fused, backend
) -> Part:  # fmt: skip
    """The op, its arguments put in order and the design chosen."""
    chunk_bytes = check_integer("chunk_bytes", chunk_bytes, SIZE)
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    fused = streaming_pays(backend) if fused is None else fused
    hidden, weight = (
        t.detach() if t.stride(1) == 1 else t.detach().contiguous() for t in (hidden, weight)
    )
    rows = row_dtype(threshold, hidden), row_dtype(inverse, hidden)
    bias = None if bias is None else bias.detach().contiguous()
    size = 0 if fused else chunk_bytes
    return _token_stats(hidden, weight, column, *rows, bias, scale, softcap, size, backend)


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
    ignore_index: int = -100,
    fused: bool | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of `z = softcap·tanh(logit_scale·(hidden @ weight.T + bias) / softcap)`, never
    holding `[N, V]`.

    Ignored rows are not multiplied: on a GPU the host waits for their number. While a CUDA graph is
    captured it may not, and they are multiplied too, and masked. Differentiable in the temperature
    only: the base model is frozen.

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
    check_target(target, len(hidden), len(weight), ignore_index)
    min_p = check_temperature(temperature, min_p, len(hidden))

    def part_of(column, threshold, inverse):
        return product_part(
            hidden,
            weight,
            column,
            threshold,
            inverse,
            bias,
            logit_scale,
            softcap,
            chunk_bytes,
            fused,
            chosen,
        )

    return statistics(part_of, target, temperature, min_p, ignore_index)
