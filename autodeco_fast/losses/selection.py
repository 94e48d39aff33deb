"""Which tokens a head learns from, by the frozen model's own confidence in them, and what each of
them counts for."""

import torch

from autodeco_fast.numerics import compute_dtype
from autodeco_fast.ops.checks import (
    COUNT,
    PROBABILITY,
    check_choice,
    check_integer,
    check_number,
    check_row,
    check_stats,
)
from autodeco_fast.stats import TokenStats

TRIVIAL, MIDDLE, IMPOSSIBLE = 0, 1, 2
_RAREST = 2.0**-32  # the step of uniforms: of a smaller fraction only 0 is below


def difficulty(stats: TokenStats, *, max_rank: int, trivial_prob: float) -> torch.Tensor:
    """TRIVIAL, MIDDLE or IMPOSSIBLE for each row, −1 where ignored. int64 `[N]`; arguments as in
    `goldilocks_weight`."""
    return bucket_of(stats.rank, stats.target_prob, max_rank=max_rank, trivial_prob=trivial_prob)


def bucket_of(
    rank: torch.Tensor, target_prob: torch.Tensor, *, max_rank: int, trivial_prob: float
) -> torch.Tensor:
    """The same of ranks and probabilities."""
    trivial = (rank == 0) & (target_prob > trivial_prob)
    bucket = torch.where(trivial, TRIVIAL, MIDDLE)
    bucket = torch.where(rank > max_rank, IMPOSSIBLE, bucket)
    return torch.where(rank < 0, -1, bucket)


def easy_token_weight(easy_fraction: float, easy_weight: str) -> float:
    """What a selected trivial token counts for."""
    return 1.0 / max(easy_fraction, _RAREST) if easy_weight == "inverse" else 1.0


def goldilocks_weight(
    stats: TokenStats,
    *,
    max_rank: int = 100,
    trivial_prob: float = 0.9,
    easy_fraction: float = 0.1,
    easy_weight: str = "inverse",
    generator: torch.Generator | None = None,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each token counts for in training, by the frozen model's own confidence; 0: not
    selected. fp32 `[N]` (fp64 where the statistics are); ignored rows are 0.

    Weighted by the inverse of their chance to be selected, trivial tokens count as much as if all
    were there: sums over the selected tokens are unbiased (Horvitz and Thompson, 1952), so a
    quantile learned from them is that of all tokens but the impossible ones.

    Args:
        stats: of the model's logits at temperature 1.
        max_rank: targets with more ids above them are *impossible*: dropped. The default is a
            choice, not a measurement.
        trivial_prob: targets that are the argmax with more probability than this are *trivial*.
        easy_fraction: share of the trivial tokens selected: those with `uniform < easy_fraction`.
        easy_weight: "inverse" lets a selected trivial token count for `1 / easy_fraction`; "none"
            for 1, as all others: errors then count for more where the model is sure, and no
            quantile of all tokens is learned.
        generator: of uniform numbers, on the device of `stats`; the default generator if None.
        uniform: `[N]` these numbers, in [0, 1), instead.

    Raises:
        ValueError: for shapes, numbers or options other than these.
    """
    check_stats(stats)
    easy_fraction = check_number("easy_fraction", easy_fraction, PROBABILITY)
    trivial_prob = check_number("trivial_prob", trivial_prob, PROBABILITY)
    max_rank = check_integer("max_rank", max_rank, COUNT)
    check_choice("easy_weight", easy_weight, ("inverse", "none"))
    if uniform is not None:
        check_row("uniform", uniform, stats.rank)
    bucket = difficulty(stats, max_rank=max_rank, trivial_prob=trivial_prob)
    if uniform is None:
        uniform = torch.rand(bucket.shape, generator=generator, device=bucket.device)
    easy = (bucket == TRIVIAL) & (uniform < easy_fraction)
    weight = (bucket == MIDDLE).to(compute_dtype(stats.max_logit))
    return weight.masked_fill(easy, easy_token_weight(easy_fraction, easy_weight))


def goldilocks_mask(
    stats: TokenStats,
    *,
    max_rank: int = 100,
    trivial_prob: float = 0.9,
    easy_fraction: float = 0.1,
    generator: torch.Generator | None = None,
    uniform: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens `goldilocks_weight` selects, where the weights are of no interest. bool `[N]`;
    arguments and errors as there."""
    return (
        goldilocks_weight(
            stats,
            max_rank=max_rank,
            trivial_prob=trivial_prob,
            easy_fraction=easy_fraction,
            generator=generator,
            uniform=uniform,
        )
        > 0
    )
