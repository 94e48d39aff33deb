"""What a policy buys: its score less that of fixed settings of its diversity.

Fixed settings are those of `static` and `greedy`. Of them count only those that no other beats in
both measures, two neighbours joined by a line: the frontier of the figure. It is found again in
every resample of the prompts, on the very samples that are compared, which favours the fixed
settings. Score and diversity are of the same prompts under every policy. A policy that is less
diverse than all fixed settings is held against the best score there is; for one that is more
diverse nothing is said.
"""

from collections.abc import Sequence

import numpy as np

from autodeco_fast.training.eval_measures import Bootstrap, Interval, Measured, interval_of

FIXED = ("static", "greedy")
RESAMPLES = 500


def frontier_score(score: np.ndarray, diversity: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The highest score of fixed settings `[S]` at diversities `[Q]`; NaN beyond the largest."""
    there = np.isfinite(score) & np.isfinite(diversity)
    score, diversity = score[there], diversity[there]
    order = np.lexsort((-score, -diversity))  # the most diverse first
    score, diversity = score[order], diversity[order]
    if not len(score):
        return np.full(len(at), np.nan)
    better = np.maximum.accumulate(np.concatenate([[-np.inf], score[:-1]])) < score
    return np.interp(at, diversity[better][::-1], score[better][::-1], right=np.nan)


def over_fixed(
    fixed: Sequence[Sequence[Measured]], others: Sequence[Sequence[Measured]], diversity: str
) -> list[Interval]:
    """Of every other policy, the difference in score at its diversity.

    Args:
        fixed, others: policies, each measured on the same prompts in the same order.
        diversity: the measure.
    """
    prompts = len(others[0])
    bootstrap = Bootstrap(prompts, resamples=RESAMPLES)

    def drawn(policies: Sequence[Sequence[Measured]], name: str) -> np.ndarray:
        nothing = (0.0, 0.0)
        return np.array(
            [bootstrap.ratios([m.pairs.get(name, nothing) for m in p]) for p in policies]
        )

    score, at = drawn(others, "score"), drawn(others, diversity)
    fixed_score, fixed_at = drawn(fixed, "score"), drawn(fixed, diversity)
    best = [frontier_score(y, x, q) for y, x, q in zip(fixed_score.T, fixed_at.T, at.T)]
    return [interval_of(d, of_one=prompts < 2) for d in score - np.array(best).T]
