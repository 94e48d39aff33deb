"""The conformal offset: how much warmer a head must be for the reference token to survive the cut 1
− α of the time.

Over calibration tokens with required temperature T* and predicted T̂ let

    s = T* − T̂,   +∞ where T* > T_max: no temperature reaches the token
                  −∞ where T* = 0: every temperature does

and q the ⌈(n + 1)(1 − α)⌉-th smallest. A token is covered at `clip(T̂ + q, 0, T_max)` exactly if s
≤ q, so a new token that is exchangeable with these is covered with probability ≥ 1 − α (split
conformal prediction). Tokens of one document resemble each other, so documents, not tokens, are
resampled for intervals.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 1000


@dataclass
class Offset:
    """A calibrated offset and what is known of it."""

    alpha: float
    offset: float
    coverage: tuple[
        float, float
    ]  # 95 % interval of the coverage on as many new documents of the same kind
    offset_interval: tuple[float, float]  # 95 %
    tokens: int
    documents: int
    reachable_alpha: float  # the smallest α for which an offset exists


def scores(required: np.ndarray, predicted: np.ndarray, max_temperature: float) -> np.ndarray:
    """s of every token, fp64."""
    s = required.astype(np.float64) - predicted
    return np.where(required > max_temperature, np.inf, np.where(required <= 0, -np.inf, s))


def _rank(n: np.ndarray | float, alpha: float) -> np.ndarray | float:
    """⌈(n + 1)(1 − α)⌉, safe against a product like 0.9·10 = 9.000000000000002."""
    return np.ceil((n + 1) * (1 - alpha) - 1e-9)


def smallest_alpha(s: np.ndarray) -> float:
    """The smallest α whose quantile is not +∞."""
    return 1 - (s < np.inf).sum() / (len(s) + 1)


def calibrate(
    s: np.ndarray,
    document: np.ndarray,
    alpha: float,
    max_temperature: float,
    seed: int = 0,
    draws: int = DRAWS,
) -> Offset:
    """The offset for α, with intervals from a bootstrap over documents.

    Args:
        s: `[n]` scores.
        document: `[n]` integers.
        alpha: in (0, 1).

    Raises:
        ValueError: if α is out of range or out of reach; the message says what can be reached.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    reachable = smallest_alpha(s)
    order = np.argsort(s, kind="stable")
    s = s[order]
    rank = int(_rank(len(s), alpha))
    if rank > len(s) or s[rank - 1] == np.inf:
        raise ValueError(
            f"alpha {alpha:g} is out of reach: {(s == np.inf).mean():.1%} of the {len(s):,} tokens "
            "need more than temperature "
            f"{max_temperature:g}; alpha must be at least {reachable:.4f}"
        )
    names, document = np.unique(document, return_inverse=True)
    document = document[order]
    generator = np.random.default_rng(seed)
    offsets, coverages = np.empty(draws), np.empty(draws)
    for i in range(draws):
        ours, theirs = (
            generator.multinomial(len(names), np.full(len(names), 1 / len(names))) for _ in range(2)
        )
        mass = ours[document].cumsum()
        at = min(int(mass.searchsorted(_rank(mass[-1], alpha))), len(s) - 1)
        offsets[i] = s[at]
        last = s.searchsorted(s[at], "right") if s[at] < np.inf else (s < np.inf).sum()
        new = theirs[document]
        coverages[i] = new[:last].sum() / new.sum()

    def clip(q):
        return float(np.clip(q, -max_temperature, max_temperature))

    def interval(x):
        return tuple(float(v) for v in np.quantile(x, (0.025, 0.975), method="nearest"))

    low, high = interval(offsets)
    return Offset(
        alpha,
        clip(s[rank - 1]),
        interval(coverages),
        (clip(low), clip(high)),
        len(s),
        len(names),
        reachable,
    )


def coverage(
    required: np.ndarray, predicted: np.ndarray, offset: float, max_temperature: float
) -> float:
    """Share of tokens whose required temperature is reached at `clip(T̂ + offset, 0, T_max)`."""
    return float((required <= np.clip(predicted + offset, 0.0, max_temperature)).mean())
