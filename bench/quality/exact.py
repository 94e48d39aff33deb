"""What a policy draws from, computed from logits: nothing is drawn, and there is no noise but that
of the questions, answers and seeds that were taken."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from autodeco_fast.policies import Policy
from autodeco_fast.policies.masking import masked
from autodeco_fast.policies.temperature import divisor
from bench.quality.frontier import STATIC, compare
from bench.quality.resampling import interval, seed_deviations

RESAMPLES = 1000


def law(
    policy: Policy, hidden: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ln p of every token under a policy `[n, V]`, and T `[n]`.

    Args:
        hidden: `[n, H]`.
        logits: `[n, V]` fp32, the model's own.
    """
    picked = policy.pick(hidden.float(), logits if policy.reads_logits else None)
    scaled = logits / divisor(picked.temperature)
    cut = policy.cut(scaled).at(picked.top_p)
    return masked(scaled, cut).log_softmax(-1), picked.temperature


class Measured(Protocol):
    """What a policy of one seed does."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many there are of each kind of thing that resamples are taken of."""

    def point(self, *picks: np.ndarray) -> tuple[float, float]:
        """Error, and what it is held against, of some things of each kind."""

    def means(self) -> dict[str, float]:
        """What else a record says of it."""


def resamples(sizes: Sequence[int]) -> list[tuple[np.ndarray, ...]]:
    """Indices into things of each kind, the same ones for every policy."""
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(size, size=size) for size in sizes) for _ in range(RESAMPLES)]


def points(seeds: Sequence[Measured], picks: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
    """`[resamples + 1, 2]` error and what it is held against, means over seeds; the first is of all
    there is, resamples are of things and of seeds."""
    every = tuple(np.arange(size) for size in seeds[0].sizes)
    of_seeds = np.array([one.point(*every) for one in seeds])
    of_things = [np.mean([one.point(*pick) for one in seeds], 0) for pick in picks]
    resampled = np.array(of_things) + seed_deviations(of_seeds, len(picks))
    return np.concatenate([of_seeds.mean(0)[None], resampled]).clip(0, (1, np.inf))


def results(measured: dict[str, list[Measured]], axis: str) -> list[dict]:
    """A result a policy, those with a head and the rules beside fixed settings.

    Args:
        measured: policy → seeds.
        axis: what errors are held against.
    """
    picks = resamples(next(iter(measured.values()))[0].sizes)
    found = {name: points(seeds, picks) for name, seeds in measured.items()}
    static = [p for name, p in found.items() if name.split()[0] in STATIC]
    out = []
    for name, p in found.items():
        means = [one.means() for one in measured[name]]
        result = {
            "variant": name,
            "error": float(p[0, 0]),
            "error_95": interval(p[:, 0]) if p[0, 0] else None,
            axis: float(p[0, 1]),
            f"{axis}_95": interval(p[:, 1]),
            **{key: float(np.mean([one[key] for one in means])) for key in means[0]},
            "seeds": len(measured[name]),
        }
        if name.split()[0] not in STATIC:
            result |= compare(p, static)
        out.append(result)
    return out
