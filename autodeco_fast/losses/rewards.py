"""The policy gradient in T: what outcomes say of a temperature, where likelihood cannot."""

import torch

from autodeco_fast.backends import refuse_transforms
from autodeco_fast.ops.checks import (
    FINITE,
    check_choice,
    check_number,
    check_row,
    check_stats,
)
from autodeco_fast.ops.logit_stats import LOWEST_TEMPERATURE
from autodeco_fast.stats import TokenStats


def reward_loss(
    temperature: torch.Tensor,
    stats: TokenStats,
    advantage: torch.Tensor,
    *,
    entropy_weight: float,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """`−A·ln p_T(y) − β·H_T` per sampled token y: its mean gradient is that of −E[reward] − β·H_T.

    REINFORCE (Williams, 1992) with T as the only parameter and an entropy bonus. `p_T` is
    softmax(z/T), over the kept set alone if `stats` were taken with `cut=True`, as they must be
    where y was sampled with Min-P. The gradient is closed form in the row's moments,
    `A·(z_y − E[z])/T² − β·Var(z)/T³`: the kept set is held fixed, and what a token on its edge does
    to the reward is not seen.

    Args:
        temperature: `[N]` predicted T; below 0.01 it counts as 0.01 and has no gradient.
        stats: `[N]`, from `token_stats` or `logit_stats` with this very `temperature`; rows with
            rank −1 are ignored. Where they know `kept`, a y outside the kept set, which T could not
            have sampled, has the entropy's term alone.
        advantage: `[N]`, A of the completion that the token is of: reward − baseline. Detached.
        entropy_weight: β, in rewards a nat; below 0 entropy costs something.
        weight: `[N]` weights, ≥ 0, or None.
        reduction: "mean" over the rows that are not ignored (by their Σ weight; 0 if there are
            none), "sum", or "none" `[N]`.

    Raises:
        ValueError: for shapes, numbers or options other than these, or `stats` without a
            temperature.
        RuntimeError: as `min_p_hinge_loss`.
    """
    refuse_transforms()
    check_stats(stats)
    check_row("temperature", temperature, stats.rank)
    check_row("advantage", advantage, stats.rank)
    if weight is not None:
        check_row("weight", weight, stats.rank)
    if stats.scaled_log_mass is None:
        raise ValueError("stats must be taken with temperature=, these have none")
    entropy_weight = check_number("entropy_weight", entropy_weight, FINITE)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    dtype, valid = stats.scaled_log_mass.dtype, stats.rank >= 0
    T = temperature.clamp(min=LOWEST_TEMPERATURE).to(dtype)
    # `kept` tokens have the largest logits: y is one of them where fewer than that are above it.
    sampled = valid if stats.kept is None else valid & (stats.rank < stats.kept)
    gap = torch.where(sampled, stats.gap, 0.0)  # inf would make the gradient NaN
    log_prob = -gap / T - stats.scaled_log_mass
    rows = -torch.where(sampled, advantage.detach().to(dtype) * log_prob, 0.0)
    rows = torch.where(valid, rows - entropy_weight * stats.scaled_entropy, 0.0)
    counted = valid.to(dtype)
    if weight is not None:
        counted = counted * weight.detach().to(dtype)
        rows = rows * counted
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    total = counted.sum()
    return rows.sum() / torch.where(total > 0, total, 1.0)
