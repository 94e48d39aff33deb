"""Measures of samples against enumeration and known laws."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from autodeco_fast.training.eval_figures import Point, frontier
from autodeco_fast.training.eval_measures import (
    Bootstrap,
    Interval,
    distinct_at,
    distinct_ngrams,
    entropy_at,
    of_prompt,
    pass_at,
    powers_of_two,
    summarised,
)
from autodeco_fast.training.eval_store import Outcome
from autodeco_fast.training.prompts import Prompt
from autodeco_fast.training.scorers import load_scorer


def mean_over_subsets(values, k: int, of) -> float:
    subsets = list(itertools.combinations(values, k))
    return sum(map(of, subsets)) / len(subsets)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for c in range(n + 1):
        samples = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            assert pass_at(n, c, k) == pytest.approx(mean_over_subsets(samples, k, max), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Over draws of n samples that are right with probability p: 1 − (1 − p)^k."""
    p, n, k = 0.3, 6, 4
    expected = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(n, c, k) for c in range(n + 1)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k)
    naive = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * (1 - (1 - c / n) ** k) for c in range(n + 1)
    )
    assert abs(naive - (1 - (1 - p) ** k)) > 0.02  # the plug-in estimate would fail


def test_pass_at_k_of_many():
    assert pass_at(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at(10_000, 0, 10_000) == 0.0
    assert pass_at(10_000, 1, 10_000) == 1.0


@pytest.mark.parametrize("samples", ["aab-", "abcd", "aaaa", "----", "aabbc-"])
def test_distinct_at_k_is_the_mean_over_all_subsets(samples):
    """'-' is a sample that is not right."""
    counts = Counter(samples.replace("-", "")).values()
    for k in range(1, len(samples) + 1):
        expected = mean_over_subsets(samples, k, lambda s: len(set(s) - {"-"}) / k)
        assert distinct_at(counts, len(samples), k) == pytest.approx(expected)


def plug_in_entropy(values) -> float:
    counts = Counter(values).values()
    return -sum(c / len(values) * math.log(c / len(values)) for c in counts)


@pytest.mark.parametrize("values", ["aab", "abcd", "aaaa", "aabbcdd"])
def test_entropy_at_m_is_the_mean_over_all_subsets(values):
    counts = list(Counter(values).values())
    for m in range(1, len(values) + 1):
        expected = mean_over_subsets(values, m, plug_in_entropy)
        assert entropy_at(counts, m) == pytest.approx(expected, abs=1e-12)


def test_entropy_does_not_grow_with_the_number_of_records():
    """Of the same law: the reason for a fixed m."""
    rng = np.random.default_rng(0)
    few, many = (
        np.mean(
            [entropy_at(list(Counter(rng.integers(0, 50, n)).values()), 20) for _ in range(200)]
        )
        for n in (20, 200)
    )
    assert few == pytest.approx(many, rel=0.01)
    plug = [np.mean([plug_in_entropy(rng.integers(0, 50, n).tolist()) for _ in range(200)])
            for n in (20, 200)]  # fmt: skip
    assert plug[1] > 1.2 * plug[0]  # which the plain entropy does


def test_distinct_ngrams():
    assert distinct_ngrams(["a b a b", "b a"], 1) == (2, 6)
    assert distinct_ngrams(["a b a b", "b a"], 2) == (2, 4)
    assert distinct_ngrams(["a", ""], 2) == (0, 0)


def test_powers_of_two():
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(11) == [1, 2, 4, 8, 11]


# Intervals


def coverage(seeds: range, level: float) -> float:
    """How often the interval of 60 Bernoulli(0.3) prompts holds 0.3, its width scaled."""
    inside = 0
    for seed in seeds:
        draws = np.random.default_rng(seed).random(60) < 0.3
        found = Bootstrap(60, resamples=400, seed=seed).ratio([(float(x), 1.0) for x in draws])
        half = (found.high - found.low) / 2 * level
        inside += abs(found.mean - 0.3) <= half + 1e-12
    return inside / len(seeds)


def test_intervals_hold_the_mean_of_a_known_law_19_times_of_20():
    assert coverage(range(600), 1.0) == pytest.approx(0.95, abs=0.03)


def test_narrower_intervals_would_show():
    """The control: the same test would refuse them."""
    assert coverage(range(600), 0.7) < 0.92


def test_an_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    found = Bootstrap(400).ratio([(float(v), 1.0) for v in values])
    expected = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.06)


def test_a_ratio_weighs_prompts_by_their_denominators():
    found = Bootstrap(3).ratio([(10.0, 10.0), (0.0, 2.0), (0.0, 0.0)])
    assert found.mean == pytest.approx(10 / 12)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0


def test_one_prompt_has_no_interval_and_none_no_mean():
    assert Bootstrap(1).ratio([(1.0, 2.0)]) == Interval(0.5)
    assert Bootstrap(2).ratio([(1.0, 2.0), (0.0, 0.0)]) == Interval(0.5)
    assert Bootstrap(2).ratio([(0.0, 0.0)] * 2) == Interval(None)
    assert str(Interval(0.5)) == "0.500"
    assert str(Interval(None)) == "–"
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_every_policy_is_resampled_alike():
    """So that differences of two policies on the same prompts are sharper than either."""
    first, second = Bootstrap(20), Bootstrap(20)
    assert (first.weights == second.weights).all()
    assert (first.weights.sum(1) == 20).all()


# A prompt's samples


def outcome(text: str, score: float, **changes) -> Outcome:
    facts = {"truncated": False, "tokens": 2, "temperature": 1.0, "kept": 6.0, **changes}
    return Outcome(text=text, score=score, **facts)


def test_measures_of_a_prompt():
    prompt = Prompt(3, {"prompt": "p", "keys": ["a", "b"]})
    outcomes = [
        outcome('{"a": 1, "b": 1}', 1.0),
        outcome('{"b": 1, "a": 1}', 1.0, truncated=True),
        outcome('{"a": 2, "b": 1}', 1.0, tokens=4, temperature=4.0, kept=None),
        outcome("no", 0.0, temperature=None),
    ]
    found = of_prompt(prompt, outcomes, load_scorer("json"), success=1.0, records=3)
    measured = summarised([found], Bootstrap(1))
    means = {name: interval.mean for name, interval in measured.items()}
    assert means["score"] == means["pass@1"] == 0.75
    assert means["pass@2"] == means["pass@4"] == 1.0
    assert means["distinct_valid@1"] == 0.75
    assert means["distinct_valid@4"] == 0.5
    assert means["distinct"] == 0.75
    assert means["entropy:a"] == pytest.approx(plug_in_entropy("112"))
    assert means["entropy:b"] == 0.0
    assert means["entropy"] == pytest.approx(means["entropy:a"] / 2)
    assert means["temperature"] == pytest.approx(6.0 / 8)
    assert means["kept"] == pytest.approx(18.0 / 6)
    assert means["tokens"] == 2.5
    assert means["truncated"] == 0.25
    few = of_prompt(prompt, outcomes, load_scorer("json"), success=1.0, records=4)
    few = summarised([few], Bootstrap(1))
    assert few["entropy"].mean == pytest.approx(plug_in_entropy("112") / 2)
    assert (measured["few_records"].mean, few["few_records"].mean) == (0.0, 1.0)


def test_every_prompt_counts_in_every_diversity():
    """Of fewer right samples than asked for the entropy is lower, of none it is 0."""
    prompt = Prompt(1, {"prompt": "p", "keys": ["a"]})
    found = []
    for right in range(5):
        texts = [f'{{"a": {i}}}' for i in range(right)] + ["no"] * (4 - right)
        outcomes = [outcome(text, float(text != "no")) for text in texts]
        one = of_prompt(prompt, outcomes, load_scorer("json"), success=1.0, records=3)
        found.append(one.pairs["entropy"])
        assert one.pairs["entropy"] == one.pairs["entropy:a"]
        assert one.pairs["distinct_2"] == (float(right > 0), 1)
    expected = [0.0, 0.0, math.log(2), math.log(3), math.log(3)]
    assert [value for value, _ in found] == pytest.approx(expected)
    assert {count for _, count in found} == {1}


def test_a_sample_is_right_from_the_score_that_is_asked_for():
    prompt = Prompt(1, {"prompt": "p", "answer": "x"})
    outcomes = [outcome("x", 0.4), outcome("y", 0.6)]
    for success, right in ((0.3, 1.0), (0.5, 0.5), (1.0, 0.0)):
        found = of_prompt(prompt, outcomes, load_scorer("exact"), success=success, records=1)
        assert found.pairs["pass@1"] == (right, 1)
        assert found.pairs["score"] == (1.0, 2)


def test_the_frontier_is_what_no_other_beats():
    def point(x: float, y: float) -> Point:
        ends = {"low": None, "high": None}
        return Point("p", "f", {"mean": y, **ends}, {"mean": x, **ends})

    points = [point(*at) for at in [(1, 9), (2, 8), (2, 7), (3, 8), (4, 1), (0, 9), (4, 0.5)]]
    assert [p.at for p in frontier(points)] == [(1, 9), (3, 8), (4, 1)]
