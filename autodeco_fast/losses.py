"""What the head learns from: the required temperature, the tokens worth learning from, and the
hinge between the two."""

import math

import torch

from autodeco_fast.backends import resolve
from autodeco_fast.ops.checks import (
    COUNT,
    INSIDE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    check_choice,
    check_integer,
    check_number,
    check_row,
    shown,
)
from autodeco_fast.ops.logit_stats import TokenStats
from autodeco_fast.ops.min_p_hinge import min_p_hinge


def _inverse_width(min_p: float) -> float:
    """`1 / (−ln p_min)`, from logits to temperature."""
    return 1 / -math.log(check_number("min_p", min_p, INSIDE))


def check_stats(stats: TokenStats) -> None:
    if not isinstance(stats, TokenStats):
        raise ValueError(
            f"stats must be TokenStats, of token_stats or logit_stats, got {shown(stats)}"
        )


def required_temperature(stats: TokenStats, min_p: float) -> torch.Tensor:
    """`T* = (max z − z_y) / (−ln p_min)`: the lowest temperature at which Min-P keeps the target.
    fp32 `[N]`, 0 where ignored.

    Raises:
        ValueError: if `min_p` is not in (0, 1).
    """
    check_stats(stats)
    return (stats.max_logit - stats.target_logit) * _inverse_width(min_p)


TRIVIAL, MIDDLE, IMPOSSIBLE = 0, 1, 2


def difficulty(stats: TokenStats, *, max_rank: int, trivial_prob: float) -> torch.Tensor:
    """TRIVIAL, MIDDLE or IMPOSSIBLE for each row, −1 where ignored. int64 `[N]`; arguments as in
    `goldilocks_mask`."""
    probability = (stats.target_logit - stats.logsumexp).exp()
    bucket = torch.where((stats.rank == 0) & (probability > trivial_prob), TRIVIAL, MIDDLE)
    bucket = torch.where(stats.rank > max_rank, IMPOSSIBLE, bucket)
    return torch.where(stats.rank < 0, -1, bucket)


def goldilocks_mask(
    stats: TokenStats,
    *,
    max_rank: int = 100,
    trivial_prob: float = 0.9,
    easy_fraction: float = 0.1,
    generator: torch.Generator | None = None,
    draw: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens to train on, by the frozen model's own confidence. bool `[N]`; ignored rows are
    False.

    Args:
        stats: of the model's logits at temperature 1.
        max_rank: targets with more ids above them are *impossible*: dropped. The default is a
            choice, not a measurement.
        trivial_prob: targets that are the argmax with more probability than this are *trivial*.
        easy_fraction: share of the trivial tokens that is kept: those with `draw < easy_fraction`.
        generator: of uniform draws, on the device of `stats`; the default generator if None.
        draw: `[N]` the draws themselves, in [0, 1), instead.

    Raises:
        ValueError: for shapes or numbers other than these.
    """
    check_stats(stats)
    easy_fraction = check_number("easy_fraction", easy_fraction, PROBABILITY)
    trivial_prob = check_number("trivial_prob", trivial_prob, PROBABILITY)
    max_rank = check_integer("max_rank", max_rank, COUNT)
    if draw is not None:
        check_row("draw", draw, len(stats.rank))
    bucket = difficulty(stats, max_rank=max_rank, trivial_prob=trivial_prob)
    if draw is None:
        draw = torch.rand(bucket.shape, generator=generator, device=bucket.device)
    return (bucket == MIDDLE) | ((bucket == TRIVIAL) & (draw < easy_fraction))


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
    gravity)-quantile of T*.

    Differentiable in the temperature, once.

    Args:
        temperature: `[N]` predicted T, fp32 (other floats are computed in fp32; fp64 on the torch
            backend).
        stats: `[N]`, from `token_stats` or `logit_stats`; rows with rank −1 are ignored.
        min_p: of the cut the head will be used with, in (0, 1).
        gravity: λ, the share of tokens allowed to fall outside the cut, ≥ 0.
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
    inv = _inverse_width(min_p)
    check_stats(stats)
    check_row("temperature", temperature, len(stats.rank))
    if weight is not None:
        check_row("weight", weight, len(stats.rank))
    gravity = check_number("gravity", gravity, NOT_NEGATIVE)
    largest = check_number("max_temperature", max_temperature, POSITIVE)
    check_choice("power", power, (1, 2))
    check_choice("unreachable", unreachable, ("drop", "clip"))
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    chosen = resolve(backend, temperature, stats.rank)
    kind = (
        torch.float64 if temperature.dtype == torch.float64 and chosen == "torch" else torch.float32
    )
    gap = stats.max_logit - stats.target_logit
    floats = [None if row is None else row.detach().to(kind).contiguous() for row in (gap, weight)]
    rows, total, mass = min_p_hinge(
        temperature.to(kind).contiguous(), floats[0], stats.rank.contiguous(), floats[1],
        inv, gravity, int(power), largest, unreachable == "clip", chosen,
    )  # fmt: skip
    if reduction == "none":
        return rows
    return total if reduction == "sum" else total / torch.where(mass > 0, mass, 1.0)
