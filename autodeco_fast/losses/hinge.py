"""The Min-P hinge: what a head learns from, and the required temperature it is pulled to."""

import math

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.numerics import compute_dtype
from autodeco_fast.ops.checks import (
    INSIDE,
    NOT_NEGATIVE,
    POSITIVE,
    check_choice,
    check_number,
    check_row,
    check_stats,
    row_parameter,
)
from autodeco_fast.ops.min_p_hinge import min_p_hinge
from autodeco_fast.stats import TokenStats


def inverse_width(min_p: float) -> float:
    """`1 / (−ln p_min)`, from logits to temperature."""
    return 1 / -math.log(check_number("min_p", min_p, INSIDE))


def required_temperature(stats: TokenStats, min_p: float) -> torch.Tensor:
    """`T* = (max z − z_y) / (−ln p_min)`: the lowest temperature at which Min-P keeps the target.
    fp32 `[N]`, 0 where ignored.

    Raises:
        ValueError: if `min_p` is not in (0, 1).
    """
    check_stats(stats)
    return stats.gap * inverse_width(min_p)


def min_p_hinge_loss(
    temperature: torch.Tensor,
    stats: TokenStats,
    *,
    min_p: float = 0.1,
    gravity: float = 0.1,
    power: int = 1,
    max_temperature: float = 2.0,
    unreachable: str = "drop",
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """`relu(T* − T)^power + gravity·T` per token; with power 1 its minimiser is the (1 −
    gravity)-quantile of T*, over the tokens that count.

    Differentiable in the temperature, once.

    Args:
        temperature: `[N]` predicted T, fp32 (other floats are computed in fp32; fp64 on the torch
            backend).
        stats: `[N]`, from `token_stats` or `logit_stats`; rows with rank −1 are ignored.
        min_p: of the cut the head will be used with, in (0, 1).
        gravity: λ, the share of the tokens allowed to fall outside the cut, ≥ 0: of the reachable
            ones where the unreachable are dropped.
        power: 1, or 2 to square the hinge (then it is no quantile).
        max_temperature: the head's T_max.
        unreachable: "drop" leaves tokens with `T* > max_temperature` out, "clip" sets their T* to
            it.
        weight: `[N]` weights, ≥ 0, or None.
        reduction: "mean" divides by the kept tokens (by their Σ weight), and is 0 when none is
            left; "sum"; "none" `[N]`.
        backend: None chooses; "triton" or "torch" forces.

    Raises:
        ValueError: for shapes, dtypes, numbers or options other than these.
        RuntimeError: under `torch.vmap`, `torch.func` transforms, forward-mode differentiation and
            `torch.jit.trace`.
    """
    inv = inverse_width(min_p)
    check_stats(stats)
    check_row("temperature", temperature, stats.rank)
    if weight is not None:
        check_row("weight", weight, stats.rank)
    gravity = check_number("gravity", gravity, NOT_NEGATIVE)
    largest = check_number("max_temperature", max_temperature, POSITIVE)
    check_choice("power", power, (1, 2))
    check_choice("unreachable", unreachable, ("drop", "clip"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    chosen = resolve(backend, temperature, stats.rank)
    # Triton computes in fp32 whatever comes.
    like = temperature if chosen == "torch" else temperature.float()
    rows, _, total, weight_sum = min_p_hinge(
        temperature.to(compute_dtype(like)).contiguous(),
        row_parameter(stats.gap, like),
        stats.rank.contiguous(),
        row_parameter(weight, like),
        inv,
        gravity,
        int(power),
        largest,
        unreachable == "clip",
        chosen,
    )
    if reduction == "none":
        return rows
    return total if reduction == "sum" else total / torch.where(weight_sum > 0, weight_sum, 1.0)
