"""What samples say of a policy: how often they are right, how different they are, what they cost.

Of n samples of a prompt, c right ones, k of them drawn without replacement:

    Pass@k               1 − C(n−c, k) / C(n, k)                    (unbiased, arXiv 2107.03374)
    distinct valid@k     Σ_v (1 − C(n−c_v, k) / C(n, k)) / k        v: the different right ones,
                                                                    c_v times each: the expected
                                                                    number of different ones over k
    entropy at m         E[−Σ_v (x_v/m) ln (x_v/m)]                 x: counts of m right ones drawn
                                                                    without replacement, at most
                                                                    ln m: policies with more right
                                                                    samples do not look more diverse
    distinct-n           different n-grams of words / all, over a prompt's samples

Every policy's diversity is of all prompts, so that none gains by failing on some: of fewer than m
right samples the entropy is that of all there are, which is lower, and 0 of none; distinct-n is 0
where there are no n-grams.

Each measure is a ratio of sums over prompts; its 95 % interval is the bootstrap's over prompts. The
same resamples serve every policy.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autodeco_fast.training.eval_store import Outcome
from autodeco_fast.training.prompts import Prompt
from autodeco_fast.training.scorers import Scorer

RESAMPLES = 2000
NGRAMS = (1, 2)


def diversities(of_records: bool) -> tuple[str, str]:
    """The measures that scores are held against; the words of records say nothing."""
    return ("entropy", "distinct") if of_records else ("distinct", "distinct_2")


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one; 1 ≤ k ≤ n."""
    if n - c < k:
        return 1.0
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def distinct_at(counts: Iterable[int], n: int, k: int) -> float:
    """The expected number of different values among k of n samples, over k.

    Args:
        counts: how often each value is there; the rest of the n have none.
    """
    return sum(pass_at(n, c, k) for c in counts) / k


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def entropy_at(counts: Sequence[int], m: int) -> float:
    """The expected entropy, in nats, of m values drawn without replacement; m ≤ Σ counts."""
    total, expected = sum(counts), 0.0
    for c, values in Counter(counts).items():
        for x in range(max(1, m - (total - c)), min(c, m) + 1):
            log_chance = (
                _log_binomial(c, x) + _log_binomial(total - c, m - x) - _log_binomial(total, m)
            )
            expected -= values * math.exp(log_chance) * x / m * math.log(x / m)
    return expected


def distinct_ngrams(texts: Iterable[str], n: int) -> tuple[int, int]:
    """Different n-grams of words in some texts, and all."""
    grams = Counter()
    for text in texts:
        words = text.split()
        grams.update(zip(*(words[i:] for i in range(n))))
    return len(grams), sum(grams.values())


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


@dataclass(frozen=True)
class Interval:
    """A measure, and its 95 % interval; None where nothing was measured, or of one prompt."""

    mean: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        shown = f"{self.mean:.3f}"
        return shown if self.low is None else f"{shown} [{self.low:.3f}, {self.high:.3f}]"


class Bootstrap:
    """Resamples of prompts, the same for everything that is measured on them."""

    def __init__(self, prompts: int, *, resamples: int = RESAMPLES, seed: int = 0):
        uniform = np.full(prompts, 1 / prompts)
        drawn = np.random.default_rng(seed).multinomial(prompts, uniform, size=resamples)
        # [1 + resamples, prompts]: how often each is drawn; the first are the prompts themselves
        self.weights = np.vstack([np.ones(prompts), drawn])

    def ratios(self, pairs: Sequence[tuple[float, float]]) -> np.ndarray:
        """Σ numerators / Σ denominators of all prompts, then of each resample; NaN of nothing.
        `[1 + resamples]`

        Args:
            pairs: one a prompt; (0, 0) where there is nothing.
        """
        numerators, denominators = (self.weights @ np.array(pairs, dtype=np.float64)).T
        empty = denominators == 0
        return np.where(empty, np.nan, numerators / np.where(empty, 1.0, denominators))

    def ratio(self, pairs: Sequence[tuple[float, float]]) -> Interval:
        """Of all prompts, with its interval; `pairs` as of `ratios`."""
        measured = sum(1 for _, denominator in pairs if denominator)
        return interval_of(self.ratios(pairs), of_one=measured < 2)


def interval_of(ratios: np.ndarray, *, of_one: bool = False) -> Interval:
    """Of what all prompts give, and then each resample.

    There is no interval of one prompt, or where a twentieth of the resamples give nothing.
    """
    mean, drawn = ratios[0], ratios[1:][np.isfinite(ratios[1:])]
    if np.isnan(mean):
        return Interval(None)
    if of_one or len(drawn) < 0.95 * (len(ratios) - 1):
        return Interval(float(mean))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))


@dataclass(frozen=True)
class Measured:
    """What is measured of a prompt's samples: name → (numerator, denominator)."""

    prompt: Prompt
    pairs: dict[str, tuple[float, float]]


def of_prompt(
    prompt: Prompt, outcomes: Sequence[Outcome], scorer: Scorer, *, success: float, records: int
) -> Measured:
    """Measures of one prompt under one policy.

    Args:
        success: the score from which a sample is right.
        records: right samples that the entropies are of, or all where there are fewer.
    """
    n, right = len(outcomes), [o for o in outcomes if o.score >= success]
    every = Counter(scorer.canonical(o.text, prompt.fields) for o in outcomes)
    valid = Counter(scorer.canonical(o.text, prompt.fields) for o in right)
    pairs = {"score": (sum(o.score for o in outcomes), n)}
    for k in powers_of_two(n):
        pairs[f"pass@{k}"] = (pass_at(n, len(right), k), 1)
        pairs[f"distinct_valid@{k}"] = (distinct_at(valid.values(), n, k), 1)
    pairs["distinct"] = (distinct_at(every.values(), n, n), 1)
    if scorer.record is not None:
        pairs |= _entropies(prompt, right, scorer, records)
    for size in NGRAMS:
        different, all_grams = distinct_ngrams((o.text for o in outcomes), size)
        pairs[f"distinct_{size}"] = (different / max(all_grams, 1), 1)
    for name in ("temperature", "top_p", "kept"):
        known = [o for o in outcomes if getattr(o, name) is not None]
        if known or name != "top_p":
            total = sum(getattr(o, name) for o in known)
            pairs[name] = (total, sum(o.tokens for o in known))
    pairs["tokens"] = (sum(o.tokens for o in outcomes), n)
    pairs["truncated"] = (sum(o.truncated for o in outcomes), n)
    return Measured(prompt, pairs)


def _entropies(
    prompt: Prompt, right: Sequence[Outcome], scorer: Scorer, records: int
) -> dict[str, tuple[float, float]]:
    found = [scorer.record(o.text, prompt.fields) for o in right]
    found = [record for record in found if record is not None]
    m, pairs = min(records, len(found)), {}
    for key in prompt.fields["keys"]:
        counts = list(Counter(record[key] for record in found).values())
        pairs[f"entropy:{key}"] = (entropy_at(counts, m), 1)
    mean = sum(e for e, _ in pairs.values()) / len(pairs)
    return {"entropy": (mean, 1), **pairs, "few_records": (float(len(found) < records), 1)}


def summarised(measured: Sequence[Measured], bootstrap: Bootstrap) -> dict[str, Interval]:
    """Every measure over some prompts, in the order of their first appearance."""
    names = dict.fromkeys(name for m in measured for name in m.pairs)
    return {
        name: bootstrap.ratio([m.pairs.get(name, (0.0, 0.0)) for m in measured]) for name in names
    }
