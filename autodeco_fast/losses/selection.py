"""Which tokens a head learns from, by the frozen model's own confidence in them."""

import torch

from autodeco_fast.ops.checks import (
    COUNT,
    PROBABILITY,
    check_integer,
    check_number,
    check_row,
    check_stats,
)
from autodeco_fast.stats import TokenStats

TRIVIAL, MIDDLE, IMPOSSIBLE = 0, 1, 2


def difficulty(stats: TokenStats, *, max_rank: int, trivial_prob: float) -> torch.Tensor:
    """TRIVIAL, MIDDLE or IMPOSSIBLE for each row, −1 where ignored. int64 `[N]`; arguments as in
    `goldilocks_mask`."""
    trivial = (stats.rank == 0) & (stats.target_prob > trivial_prob)
    bucket = torch.where(trivial, TRIVIAL, MIDDLE)
    bucket = torch.where(stats.rank > max_rank, IMPOSSIBLE, bucket)
    return torch.where(stats.rank < 0, -1, bucket)


def goldilocks_mask(
    stats: TokenStats,
    *,
    max_rank: int = 100,
    trivial_prob: float = 0.9,
    easy_fraction: float = 0.1,
    generator: torch.Generator | None = None,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens to train on, by the frozen model's own confidence. bool `[N]`; ignored rows are
    False.

    Args:
        stats: of the model's logits at temperature 1.
        max_rank: targets with more ids above them are *impossible*: dropped. The default is a
            choice, not a measurement.
        trivial_prob: targets that are the argmax with more probability than this are *trivial*.
        easy_fraction: share of the trivial tokens kept: those with `uniform < easy_fraction`.
        generator: of uniform numbers, on the device of `stats`; the default generator if None.
        uniform: `[N]` these numbers, in [0, 1), instead.

    Raises:
        ValueError: for shapes or numbers other than these.
    """
    check_stats(stats)
    easy_fraction = check_number("easy_fraction", easy_fraction, PROBABILITY)
    trivial_prob = check_number("trivial_prob", trivial_prob, PROBABILITY)
    max_rank = check_integer("max_rank", max_rank, COUNT)
    if uniform is not None:
        check_row("uniform", uniform, len(stats.rank))
    bucket = difficulty(stats, max_rank=max_rank, trivial_prob=trivial_prob)
    if uniform is None:
        uniform = torch.rand(bucket.shape, generator=generator, device=bucket.device)
    return (bucket == MIDDLE) | ((bucket == TRIVIAL) & (uniform < easy_fraction))
