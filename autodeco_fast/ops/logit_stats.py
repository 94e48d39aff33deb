"""`logit_stats`: what losses and filters need to know of each token's logits. `ops/token_stats.py`:
the same without logits."""

import math
from collections.abc import Callable

import torch

from autodeco_fast.backends import implementation, resolve
from autodeco_fast.numerics import ALL_FLOATS, GREEDY_BELOW, compute_dtype
from autodeco_fast.ops.checks import (
    FINITE,
    PROBABILITY,
    check_choice,
    check_logits,
    check_number,
    check_row,
    check_softcap,
    check_target,
    row_parameter,
    unit_stride,
)
from autodeco_fast.stats import (
    ABSENT,
    IGNORED,
    RowSums,
    TokenStats,
    at_temperature,
    finish,
)

LOWEST_TEMPERATURE = 1e-2  # AutoDeco's clamp
# Of column, threshold, 1/T, and whether these sums are of what is above the threshold.
SumsOf = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None, bool], RowSums]


class _AtTemperature(torch.autograd.Function):
    """ln Σ e^{z/T}, the entropy of p = softmax(z/T) and ln Σ e^x with x = (z − max z)/T.

    `∂/∂T = −E_p[z]/T² = −(max z / T + E_p[x])/T`, `Var_p(z)/T³ = Var_p(x)/T` and `−E_p[x]/T`. The
    entropy is ln Σ e^x − E_p[x], of which no term is negative: nothing cancels.
    """

    @staticmethod
    def forward(ctx, temperature, top, log_mass, mean, variance):
        ctx.save_for_backward(temperature, top, mean, variance)
        entropy = (log_mass - mean).clamp(min=0.0)
        return top / temperature + log_mass, entropy, log_mass.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logsumexp, d_entropy, d_log_mass):
        T, top, mean, variance = ctx.saved_tensors
        sums = d_logsumexp * (top / T + mean) + d_log_mass * mean
        return (d_entropy * variance - sums) / T, None, None, None, None


def inverse_of(temperature: torch.Tensor) -> torch.Tensor:
    """1/T `[N]` fp64, of T raised to the lowest, NaN of inf: backends round it once, to their
    compute dtype."""
    T = temperature.clamp(min=LOWEST_TEMPERATURE).double()
    return 1.0 / T.masked_fill(T.isinf(), torch.nan)


def _below_cut(top: torch.Tensor, temperature: torch.Tensor, min_p: float) -> torch.Tensor:
    """The largest number under the cut of Min-P: what is above it is kept."""
    T = torch.where(temperature < GREEDY_BELOW, 0.0, temperature.to(top.dtype))
    cut = top + T * math.log(min_p) if min_p > 0 else top - torch.inf
    return torch.nextafter(cut, torch.full_like(cut, -torch.inf))


def columns_of(target: torch.Tensor, V: int, ignore_index: int, first_id: int = 0) -> torch.Tensor:
    """Targets' columns among V ids from `first_id` on, `[N]` int64: `ABSENT` where they are none of
    them, as an id on a GPU may be that nobody looked at, `IGNORED` at `ignore_index`."""
    column = target - first_id
    column = torch.where((column >= 0) & (column < V), column, ABSENT)
    return torch.where(target == ignore_index, IGNORED, column)


def statistics(
    sums_of: SumsOf,
    column: torch.Tensor,
    temperature: torch.Tensor | None,
    min_p: float | None,
    cut: bool = False,
) -> TokenStats:
    """From what makes row sums to statistics, differentiable in the temperature."""
    with torch.no_grad():
        stats, moments = _without_graph(sums_of, column, temperature, min_p, cut)
    if temperature is None:
        return stats
    T = temperature.clamp(min=LOWEST_TEMPERATURE).to(moments[0].dtype)
    logsumexp, entropy, log_mass = _AtTemperature.apply(T, stats.max_logit, *moments)
    return stats._replace(
        temperature=T,
        scaled_logsumexp=logsumexp,
        scaled_entropy=entropy,
        scaled_log_mass=log_mass,
    )


def _without_graph(
    sums_of: SumsOf,
    column: torch.Tensor,
    temperature: torch.Tensor | None,
    min_p: float | None,
    cut: bool,
) -> tuple[TokenStats, list[torch.Tensor]]:
    """The fields that do not depend on T, `kept`, and the moments at T that the others are made
    of."""
    inverse = None if temperature is None else inverse_of(temperature)
    floats, ints = sums_of(column, None, None if cut else inverse, False)
    stats, scaled = TokenStats(*finish((floats[:4], ints))), floats[4:]
    if inverse is None:
        return stats, []
    if min_p is not None:  # ranks against the cut instead of the target: a second sweep
        # The maximum is kept, also where a second product rounds it to below its own cut.
        best = torch.where(column == IGNORED, IGNORED, stats.argmax)
        below = _below_cut(stats.max_logit, temperature, min_p)
        above, counts = sums_of(best, below, inverse if cut else None, cut)
        stats = stats._replace(kept=(counts[1] + (stats.max_logit > below)).clamp(min=0))
        if cut:
            scaled = _unless_greedy(above[4:], temperature)
    return stats, at_temperature(scaled, ignored=stats.rank < 0)


def _unless_greedy(scaled: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Sums of the kept set, `[3, N]`; those of one token alone where T is greedy, however many
    tie."""
    greedy = temperature < GREEDY_BELOW
    mass, first, second = scaled
    of_one = torch.where(greedy, 1.0, mass), *(torch.where(greedy, 0.0, x) for x in (first, second))
    return torch.stack(of_one)


def check_temperature(
    temperature: torch.Tensor | None, min_p: float | None, like: torch.Tensor, cut: bool = False
) -> float | None:
    """min_p, checked with the temperature and `cut`."""
    if temperature is not None:
        check_row("temperature", temperature, like)
    check_choice("cut", cut, (False, True))
    if min_p is None:
        if cut:
            raise ValueError("cut needs min_p and a temperature: they make the kept set")
        return None
    if temperature is None:
        raise ValueError("min_p needs a temperature: the kept set depends on it")
    return check_number("min_p", min_p, PROBABILITY)


@torch.library.custom_op("autodeco_fast::logit_stats", mutates_args=())
def _logit_stats(
    logits: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    cut: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums; arguments as in `kernels.logit_stats.logit_stats`."""
    run = implementation(backend, "logit_stats")
    return run(logits, column, threshold, inverse_temperature, logit_scale, softcap, cut)


def fake_row_sums(
    like: torch.Tensor, column: torch.Tensor, inverse_temperature: torch.Tensor | None
) -> RowSums:
    """Shapes and dtypes of row sums."""
    n = column.shape[0]
    floats = like.new_empty(4 if inverse_temperature is None else 7, n, dtype=compute_dtype(like))
    return floats, column.new_empty(2, n)


@_logit_stats.register_fake
def _(logits, column, threshold, inverse_temperature, logit_scale, softcap, cut, backend):
    return fake_row_sums(logits, column, inverse_temperature)


def logit_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: torch.Tensor | None = None,
    min_p: float | None = None,
    cut: bool = False,
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
        cut: whether the fields at a temperature are those of softmax(z/T) over the kept set alone,
            so that `scaled_log_prob` is ln p_T(y) for a y in it. Derivatives hold the set
            fixed. Below T = 1e-3 a row is greedy: entropy 0.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes or numbers other than these.
        RuntimeError: under `torch.vmap`, `torch.func` transforms, forward-mode differentiation and
            `torch.jit.trace`.
    """
    check_logits(logits, ALL_FLOATS)
    chosen = resolve(backend, logits)
    check_target(target, logits, logits.shape[1], ignore_index)
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    min_p = check_temperature(temperature, min_p, logits, cut)
    logits = unit_stride(logits)

    def sums_of(column, threshold, inverse, cut):
        rows = row_parameter(threshold, logits), row_parameter(inverse, logits)
        return _logit_stats(logits, column, *rows, scale, softcap, cut, chosen)

    column = columns_of(target, logits.shape[1], ignore_index)
    return statistics(sums_of, column, temperature, min_p, cut)
