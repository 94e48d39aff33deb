"""What a policy buys over fixed settings, on laws where that is known."""

import numpy as np
import pytest

from autodeco_fast.training.eval_measures import Interval, Measured, of_prompt
from autodeco_fast.training.eval_store import Outcome
from autodeco_fast.training.eval_verdict import frontier_score, over_fixed
from autodeco_fast.training.prompts import Prompt
from autodeco_fast.training.scorers import load_scorer


def test_the_frontier_between_its_points_and_beyond():
    diversity = np.array([1.0, 2.0, 2.0, 3.0, 1.5])
    score = np.array([0.9, 0.5, 0.7, 0.1, 0.6])  # the last is beaten by the third
    at = np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.1])
    expected = [0.9, 0.9, 0.8, 0.7, 0.4, 0.1, np.nan]
    assert frontier_score(score, diversity, at) == pytest.approx(expected, nan_ok=True)
    nothing = np.array([np.nan, 0.5])
    assert frontier_score(nothing, diversity[:2], at[1:2]) == pytest.approx(0.5)
    assert np.isnan(frontier_score(nothing[:1], diversity[:1], at)).all()


def policy(diversity: float, score: float, *, seed: int, prompts: int = 60) -> list[Measured]:
    """Scores of 16 samples a prompt around a mean, harder prompts the same for every policy."""
    hard = np.random.default_rng(0).normal(scale=0.1, size=prompts)
    chance = np.clip(score + hard, 0, 1)
    right = np.random.default_rng(seed).binomial(16, chance)
    return [
        Measured(Prompt(n + 1, {}), {"score": (float(r), 16), "distinct": (diversity, 1)})
        for n, r in enumerate(right)
    ]


def fixed(seed: int) -> list[list[Measured]]:
    """On the line score = 1 − diversity, and one below it."""
    line = [policy(d, 1 - d, seed=seed + i) for i, d in enumerate((0.2, 0.4, 0.6, 0.8))]
    return [*line, policy(0.5, 0.3, seed=seed + 9)]


def test_the_difference_is_found():
    above, on, below = (policy(0.5, 0.5 + by, seed=50 + i) for i, by in enumerate((0.15, 0, -0.1)))
    found = over_fixed(fixed(1), [above, on, below], "distinct")
    for interval, truth in zip(found, (0.15, 0.0, -0.1)):
        assert interval.low < truth < interval.high
        assert interval.mean == pytest.approx(truth, abs=0.03)
        assert interval.high - interval.low < 0.08
    assert found[0].low > 0
    assert found[2].high < 0


def test_a_policy_on_the_line_is_called_better_as_seldom_as_it_should():
    """Of 100 draws of everything; and one that is better, nearly always: the control."""
    called = {0.0: 0, 0.06: 0}
    for seed in range(100):
        compared = [policy(0.5, 0.5 + by, seed=10_000 + 20 * seed) for by in called]
        for by, interval in zip(called, over_fixed(fixed(20 * seed), compared, "distinct")):
            called[by] += interval.low > 0
    assert called[0.0] <= 8
    assert called[0.06] >= 80


def test_nothing_is_said_beyond_the_fixed_settings():
    more, less = policy(0.9, 0.5, seed=3), policy(0.1, 0.9, seed=4)
    none, some = over_fixed(fixed(1), [more, less], "distinct")
    assert none == Interval(None)
    assert some.mean == pytest.approx(0.1, abs=0.03)  # over the best score there is
    one = over_fixed([f[:1] for f in fixed(1)], [less[:1]], "distinct")[0]
    assert one.low is None


def of_records(wide: tuple[int, int], narrow: tuple[int, int]) -> list[Measured]:
    """Of 20 wide prompts and 20 narrow ones, each (right samples of 20, values that they take)."""
    found = []
    for line, (right, values) in enumerate([wide, narrow] * 20):
        texts = [f'{{"a": {i % values}}}' for i in range(right)] + ["no"] * (20 - right)
        facts = {"truncated": False, "tokens": 1, "temperature": 1.0, "kept": 1.0}
        outcomes = [Outcome(text=text, score=float(text != "no"), **facts) for text in texts]
        prompt = Prompt(line + 1, {"prompt": "p", "keys": ["a"]})
        found.append(of_prompt(prompt, outcomes, load_scorer("json"), success=1.0, records=10))
    return found


def test_a_policy_does_not_gain_by_failing_on_narrow_prompts():
    """It is worse in score and entropy on every prompt, and fails on half of those with little to
    vary: without them it would look more diverse than the fixed setting."""
    better, worse = of_records((20, 20), (12, 2)), of_records((20, 12), (9, 2))
    (interval,) = over_fixed([better], [worse], "entropy")
    assert interval.mean == pytest.approx(0.725 - 0.8)
    assert interval.high < 0
    right = [m for m in worse if m.pairs["few_records"] == (0.0, 1)]  # the control
    mean = sum(m.pairs["entropy"][0] for m in right) / len(right)
    assert mean > sum(m.pairs["entropy"][0] for m in better) / len(better)
