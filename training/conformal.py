"""The conformal offset: how much warmer a head must be for 1 − α of the tokens to be covered.

Over calibration tokens with required temperature T* and predicted T̂ let

    s = T* − T̂;    +∞ where T* > T_max: no temperature reaches the token;
                   −∞ where T* = 0: every temperature does

and q the ⌈(n + 1)(1 − α)⌉-th smallest. A token is covered at `clip(T̂ + q, 0, T_max)` exactly if s
≤ q, so a new token that is exchangeable with these is covered with probability ≥ 1 − α (split
conformal prediction). Tokens of one document resemble each other, so documents, not tokens, are
resampled for intervals.
"""

import math
from dataclasses import dataclass

import numpy as np

SAMPLES = 1000  # of the bootstrap


@dataclass
class Offset:
    """A calibrated offset and what is known of it."""

    alpha: float
    offset: float
    # 95 % interval of the coverage on as many new documents like these
    coverage: tuple[float, float]
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
    *,
    alpha: float,
    max_temperature: float,
    seed: int = 0,
    samples: int = SAMPLES,
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
            f"need more than temperature {max_temperature:g}; alpha must be at least "
            f"{math.ceil(reachable * 1e4 - 1e-10) / 1e4:.4f}"
        )
    offsets, coverages = _bootstrap(s, document[order], alpha=alpha, seed=seed, samples=samples)
    low, high = (float(np.clip(q, -max_temperature, max_temperature)) for q in _interval(offsets))
    return Offset(
        alpha=alpha,
        offset=float(np.clip(s[rank - 1], -max_temperature, max_temperature)),
        coverage=_interval(coverages),
        offset_interval=(low, high),
        tokens=len(s),
        documents=len(np.unique(document)),
        reachable_alpha=reachable,
    )


def _interval(x: np.ndarray) -> tuple[float, float]:
    """95 %."""
    low, high = np.quantile(x, (0.025, 0.975), method="nearest")
    return float(low), float(high)


def _bootstrap(
    s: np.ndarray, document: np.ndarray, *, alpha: float, seed: int, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of resampled documents, and their coverage of others; scores are sorted."""
    names, document = np.unique(document, return_inverse=True)
    generator, even = np.random.default_rng(seed), np.full(len(names), 1 / len(names))
    offsets, coverages = np.empty(samples), np.empty(samples)
    finite = (s < np.inf).sum()
    for i in range(samples):
        ours, theirs = (generator.multinomial(len(names), even) for _ in range(2))
        mass = ours[document].cumsum()
        at = min(int(mass.searchsorted(_rank(mass[-1], alpha))), len(s) - 1)
        offsets[i] = s[at]
        last = s.searchsorted(s[at], "right") if s[at] < np.inf else finite
        new = theirs[document]
        coverages[i] = new[:last].sum() / new.sum()
    return offsets, coverages


def coverage(
    required: np.ndarray, predicted: np.ndarray, *, offset: float = 0.0, max_temperature: float
) -> float:
    """Share of tokens whose required temperature is reached at `clip(T̂ + offset, 0, T_max)`."""
    return float((required <= np.clip(predicted + offset, 0.0, max_temperature)).mean())
