"""Intervals of the quality studies: seeds are few, and what shared its noise is not counted
twice."""

from itertools import pairwise

import numpy as np
import pytest

from bench.quality import frontier, resampling
from bench.quality.resampling import interval, seed_deviations

NORMAL_ONLY = (resampling.NORMAL,) * len(resampling.STUDENT)


def seed_of(right: np.ndarray, noise: int = 0) -> list[frontier.Lines]:
    """What a seed wrote for one prompt: which draws are valid."""
    records = [{"a": "x"} if r else None for r in right]
    return [frontier.Lines("t", {"a": 2}, records, [], noise=noise)]


def test_seeds_that_drew_with_the_same_noise_are_refused():
    """Seeds that draw the same would look like as many draws more."""
    right = np.random.default_rng(0).random(50) < 0.8
    with pytest.raises(ValueError, match=r"must draw with noise of their own, got \[3, 3\]"):
        frontier.points({str(s): seed_of(right, noise=3) for s in range(2)})


def test_policies_with_the_same_noise_are_pairs():
    right, others = np.random.default_rng(0).random((2, 3, 100)) < 0.7
    for seeds in (1, 3):
        one, same, other = (
            frontier.points({str(s): seed_of(r[s], noise=s) for s in range(seeds)})
            for r in (right, right, others)
        )
        assert frontier.over(one, same)["ratio_95"] == [1.0, 1.0]
        low, high = frontier.over(one, other)["ratio_95"]
        assert high > 1.2 * low


def covered(n: int, *, spread: float, draws: int, times: int = 300) -> float:
    """How often the interval of n seeds holds the chance that they share, if each is right with a
    chance of its own and draws so often."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(times):
        chances = rng.normal(0.5, spread, n)
        of_seeds = (rng.random((n, draws)) < chances[:, None]).mean(1)
        low, high = interval(np.array([0.0, *(of_seeds.mean() + seed_deviations(of_seeds, 300))]))
        hits += low <= 0.5 <= high
    return hits / times


@pytest.mark.parametrize(("spread", "draws"), [(0.05, 1000), (0.0, 100)])
def test_intervals_of_few_seeds_hold(monkeypatch, spread, draws):
    """Whether training or drawing makes them differ. The twin has the normal quantiles."""
    assert all(0.91 < covered(n, spread=spread, draws=draws) < 0.99 for n in (3, 5))
    monkeypatch.setattr(resampling, "STUDENT", NORMAL_ONLY)
    assert covered(3, spread=spread, draws=draws) < 0.88


def test_one_seed_has_no_deviation_and_too_many_have_no_quantile():
    assert not seed_deviations(np.array([[0.3, 0.4]]), 5).any()
    with pytest.raises(ValueError, match="seeds must be 1 to 10, got 11"):
        seed_deviations(np.zeros(11), 5)
    assert all(a > b > resampling.NORMAL for a, b in pairwise(resampling.STUDENT))
