"""`logit_stats`: what losses and filters need to know of each token's logits. `ops/token_stats.py`:
the same without logits."""

import math
from collections.abc import Callable

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.ops.checks import (
    ALL_FLOATS,
    FINITE,
    PROBABILITY,
    check_logits,
    check_number,
    check_row,
    check_softcap,
    check_target,
)
from autodeco_fast.stats import ABSENT, IGNORED, Part, TokenStats, finish
from autodeco_fast.torch_backend import logit_stats as torch_backend

LOWEST_TEMPERATURE = 1e-2  # AutoDeco's clamp
GREEDY_BELOW = 1e-3
PartOf = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor | None], Part
]  # of column, threshold, 1/T


class _AtTemperature(torch.autograd.Function):
    """ln Σ e^{z/T} and the entropy of p = softmax(z/T): `∂/∂T = −E_p[z]/T²` and `Var_p(z)/T³`."""

    @staticmethod
    def forward(ctx, temperature, logsumexp, mean, variance):
        ctx.save_for_backward(temperature, mean, variance)
        return logsumexp.clone(), (logsumexp - mean / temperature).clamp(min=0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logsumexp, d_entropy):
        T, mean, variance = ctx.saved_tensors
        return (d_entropy * variance / T - d_logsumexp * mean) / (T * T), None, None, None


def _below_cut(top: torch.Tensor, temperature: torch.Tensor, min_p: float) -> torch.Tensor:
    """The largest number under the cut of Min-P: what is above it is kept."""
    T = torch.where(temperature < GREEDY_BELOW, 0.0, temperature.to(top.dtype))
    cut = top + T * math.log(min_p) if min_p > 0 else top - torch.inf
    return torch.nextafter(cut, torch.full_like(cut, -torch.inf))


def statistics(
    part_of: PartOf,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    min_p: float | None,
    ignore_index: int,
) -> TokenStats:
    """From what makes parts of the whole vocabulary to statistics, differentiable in the
    temperature."""
    with torch.no_grad():
        column = torch.where(target == ignore_index, IGNORED, target)
    T = None if temperature is None else temperature.clamp(min=LOWEST_TEMPERATURE)
    fields = finish(*part_and_temperature(part_of, column, T))
    stats = TokenStats(*fields[:6])
    if T is None:
        return stats
    T = T.to(fields[6].dtype)
    logsumexp, entropy = _AtTemperature.apply(T, *fields[6:])
    stats = stats._replace(temperature=T, scaled_logsumexp=logsumexp, scaled_entropy=entropy)
    if min_p is None:
        return stats
    with torch.no_grad():  # ranks against the cut instead of the target: a second sweep
        nowhere = torch.where(column == IGNORED, IGNORED, ABSENT)
        _, ints = part_of(nowhere, _below_cut(stats.max_logit, temperature, min_p), None)
    return stats._replace(kept=ints[1].clamp(min=0))


def part_and_temperature(
    part_of: PartOf, column: torch.Tensor, temperature: torch.Tensor | None
) -> tuple[Part, torch.Tensor | None]:
    """The part of all columns, and T as `finish` takes it."""
    T = None if temperature is None else temperature.detach()
    with torch.no_grad():
        part = part_of(column, None, None if T is None else 1.0 / T)
    return part, None if T is None else T.to(part[0].dtype)


def check_temperature(
    temperature: torch.Tensor | None, min_p: float | None, n: int
) -> float | None:
    """min_p, checked with the temperature."""
    if temperature is not None:
        check_row("temperature", temperature, n)
    if min_p is None:
        return None
    if temperature is None:
        raise ValueError("min_p needs a temperature: the kept set depends on it")
    return check_number("min_p", min_p, PROBABILITY)


def row_dtype(x: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A row of parameters as backends take it: contiguous, fp32, or fp64 beside fp64."""
    return None if x is None else x.to(torch_backend.kind_of(like)).contiguous()


@torch.library.custom_op("autodeco_fast::logit_stats", mutates_args=())
def _logit_stats(
    logits: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A part; arguments as in `kernels.logit_stats.logit_stats`."""
    if backend == "triton":
        from autodeco_fast.kernels.logit_stats import logit_stats as rows
    else:
        rows = torch_backend.logit_stats
    return rows(logits, column, threshold, inverse_temperature, logit_scale, softcap)


def fake_part(
    like: torch.Tensor, column: torch.Tensor, inverse_temperature: torch.Tensor | None
) -> Part:
    """Shapes and dtypes of a part."""
    n = column.shape[0]
    floats = like.new_empty(
        4 if inverse_temperature is None else 7, n, dtype=torch_backend.kind_of(like)
    )
    return floats, column.new_empty(2, n)


@_logit_stats.register_fake
def _(logits, column, threshold, inverse_temperature, logit_scale, softcap, backend):
    return fake_part(logits, column, inverse_temperature)


def logit_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: torch.Tensor | None = None,
    min_p: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of materialised logits in one read. Differentiable in the temperature, not in the
    logits.

    Args:
        logits: `[N, V]` bf16, fp16 or fp32 (fp64 on the torch backend).
        target: `[N]` int64 ids, `ignore_index` where there is none.
        logit_scale, softcap: `z = softcap·tanh(logit_scale·logits / softcap)`; no tanh for None.
        temperature: `[N]`, for the fields at a temperature; raised to 0.01 where lower. NaN or inf
            gives NaN there.
        min_p: in [0, 1], for `kept`: a second read.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes or numbers other than these.
        RuntimeError: under `torch.vmap`, `torch.func` transforms, forward-mode differentiation and
            `torch.jit.trace`.
    """
    check_logits(logits, ALL_FLOATS)
    chosen = resolve(backend, logits)
    check_target(target, *logits.shape, ignore_index)
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    min_p = check_temperature(temperature, min_p, len(logits))
    logits = logits.detach() if logits.stride(1) == 1 else logits.detach().contiguous()

    def part_of(column, threshold, inverse):
        rows = row_dtype(threshold, logits), row_dtype(inverse, logits)
        return _logit_stats(logits, column, *rows, scale, softcap, chosen)

    return statistics(part_of, target, temperature, min_p, ignore_index)
