"""AutoDeco's two losses (arXiv 2510.26697) as its code has them, in closed form or with their own
backward."""

import torch

from autodeco_fast.backends import refuse_transforms
from autodeco_fast.numerics import ALL_FLOATS
from autodeco_fast.ops.checks import (
    FINITE,
    NOT_NEGATIVE,
    PROBABILITY,
    SIZE,
    check_choice,
    check_integer,
    check_number,
    check_product,
    check_row,
    check_softcap,
    check_stats,
    check_target,
)
from autodeco_fast.ops.logit_stats import LOWEST_TEMPERATURE, columns_of
from autodeco_fast.ops.soft_top_p import soft_top_p_rows
from autodeco_fast.ops.token_stats import CHUNK_BYTES
from autodeco_fast.stats import IGNORED, TokenStats

_WEIGHTINGS, _REDUCTIONS = ("unscaled", "scaled", None), ("mean", "sum", "none")


def reduced(rows: torch.Tensor, kept: torch.Tensor, reduction: str) -> torch.Tensor:
    """Rows, their sum, or their sum over the kept ones, 0 if none is; rows that are not kept hold
    0."""
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / kept.sum().clamp(min=1)


def learned_by_autodeco(
    stats: TokenStats,
    easy_drop: float,
    generator: torch.Generator | None = None,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which rows the temperature loss looks at: those with a target, less a share of those whose
    target is the argmax. [N]"""
    if uniform is None:
        uniform = torch.rand(stats.rank.shape, generator=generator, device=stats.rank.device)
    return (stats.rank >= 0) & ~((stats.rank == 0) & (uniform < easy_drop))


def autodeco_temperature_loss(
    temperature: torch.Tensor,
    stats: TokenStats,
    *,
    easy_drop: float = 0.6,
    weighting: str | None = "unscaled",
    generator: torch.Generator | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """AutoDeco's temperature loss: `CE(z/T, y)`, weighted by the model's own confidence, with easy
    tokens left out at random.

    Closed form of the row's moments at T: `CE = (max z − z_y)/T + ln Σ e^{(z − max z)/T}`, whose
    gradient is `(z_y − E_p[z]) / T²`.

    Args:
        temperature: `[N]` predicted T; below 0.01 it counts as 0.01 and has no gradient.
        stats: `[N]`, from `token_stats` or `logit_stats` with this very `temperature`; rows with
            rank −1 are ignored.
        easy_drop: share of the rows with rank 0 that is left out, in [0, 1]. Rank 0 also holds
            targets that tie with an argmax of lower id, which AutoDeco's `argmax(z) = y` does not.
        weighting: "unscaled" multiplies by softmax(z)_y, "scaled" by softmax(z/T)_y, both detached;
            None by 1.
        generator: of that choice, on the device of `stats`; the default generator if None.
        reduction: "mean" over the rows left (0 if none is), "sum", or "none" `[N]`.

    Raises:
        ValueError: for shapes, numbers or options other than these, or `stats` without a
            temperature.
        RuntimeError: as `min_p_hinge_loss`.
    """
    refuse_transforms()
    check_stats(stats)
    check_row("temperature", temperature, stats.rank)
    if stats.scaled_log_mass is None:
        raise ValueError("stats must be taken with temperature=, these have none")
    easy_drop = check_number("easy_drop", easy_drop, PROBABILITY)
    check_choice("weighting", weighting, _WEIGHTINGS)
    check_choice("reduction", reduction, _REDUCTIONS)
    rows = stats.gap / temperature.clamp(min=LOWEST_TEMPERATURE) + stats.scaled_log_mass
    if weighting == "unscaled":
        rows = rows * stats.target_prob
    elif weighting == "scaled":
        rows = rows * (-rows).detach().exp()
    kept = learned_by_autodeco(stats, easy_drop, generator)
    return reduced(torch.where(kept, rows, 0.0), kept, reduction)


def soft_top_p_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    *,
    steepness: float = 30.0,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int = CHUNK_BYTES,
    reduction: str = "mean",
) -> torch.Tensor:
    """AutoDeco's soft top-p loss, differentiable in T and top-p, never holding `[N, V]`.

    `p = softmax(z/T)` in descending order with running sum C is damped by
    `exp(−steepness·relu(C − top_p))`, normalised to q; the loss is `−ln(q_y + 1e-9)·softmax(z)_y`,
    the second factor detached. Derivation of the gradients: `torch_backend/soft_top_p.py`. Tokens
    with the logit of the target count in the order of their ids.

    Args:
        hidden, weight, target, bias, logit_scale, softcap, ignore_index: as in `token_stats`.
        temperature, top_p: `[N]`.
        steepness: ≥ 0.
        chunk_bytes: of the logits made at a time.
        reduction: "mean" over the rows that have a target (0 if none has), "sum", or "none" `[N]`.

    Raises:
        ValueError: for shapes, dtypes, numbers or options other than these.
        RuntimeError: as `min_p_hinge_loss`.
    """
    check_product(hidden, weight, bias, ALL_FLOATS)
    check_target(target, hidden, weight.shape[0], ignore_index)
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        check_row(name, value, hidden)
    steepness = check_number("steepness", steepness, NOT_NEGATIVE)
    scale, softcap = check_number("logit_scale", logit_scale, FINITE), check_softcap(softcap)
    chunk_bytes = check_integer("chunk_bytes", chunk_bytes, SIZE)
    check_choice("reduction", reduction, _REDUCTIONS)
    column = columns_of(target, weight.shape[0], ignore_index)
    valid = column >= 0
    column = torch.where(valid, column, IGNORED)
    options = {"bias": bias, "steepness": steepness, "logit_scale": scale, "softcap": softcap}
    rows = soft_top_p_rows(
        hidden, weight, column, temperature, top_p, **options, chunk_bytes=chunk_bytes
    )
    return reduced(rows, valid, reduction)
