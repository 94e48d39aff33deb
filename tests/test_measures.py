"""What the measures of policies mean, on logits small enough to do by hand."""

import math

import numpy as np
import pytest
import torch

from autodeco_fast import logit_stats, required_temperature
from autodeco_fast.training import measures
from autodeco_fast.training.report_data import Domain, v_curve
from autodeco_fast.training.scan_store import ScanTokens

N, V = 300, 40


class Logits:
    """A base model whose hidden states are its logits."""

    vocabulary = V

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


def make_tokens() -> ScanTokens:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(N, V, generator=g) * 3
    y = z.softmax(-1).multinomial(1, generator=g)[:, 0]
    stats = logit_stats(z, y)
    return ScanTokens(
        hidden=z,
        gap=stats.max_logit - stats.target_logit,
        target_prob=(stats.target_logit - stats.logsumexp).exp(),
        entropy=stats.entropy,
        rank=stats.rank.int(),
        target=y.int(),
        document=torch.arange(N).int() % 7,
        position=torch.arange(N).int(),
    )


def measure(tokens: ScanTokens, **policies: torch.Tensor) -> dict[str, torch.Tensor]:
    return measures.measure(tokens, Logits(), policies, min_p=0.1)


def test_measures_follow_their_definitions():
    tokens, T = make_tokens(), 0.8
    target = tokens.target.long()
    p = (tokens.hidden.double() / T).softmax(-1)
    p_y = p.gather(1, target[:, None])[:, 0]
    inside = p >= 0.1 * p.amax(-1, keepdim=True)
    sums = measure(tokens, fixed=torch.full((N,), T))["fixed"]
    got = measures.means(sums)
    covered = inside.gather(1, target[:, None])[:, 0]
    assert got["coverage"] == pytest.approx(covered.double().mean().item())
    assert got["temperature"] == pytest.approx(T, rel=1e-6)
    assert got["kept_set_size"] == pytest.approx(inside.sum(-1).double().mean().item())
    assert got["nats"] == pytest.approx(-p_y.log().mean().item(), rel=1e-5)
    assert sums[:, 4].tolist() == torch.bincount(tokens.document).tolist()


def test_the_oracle_covers_whatever_can_be_reached():
    tokens = make_tokens()
    required = required_temperature(tokens.stats(), 0.1)
    sums = measure(tokens, oracle=required.clamp(max=2.0))
    assert measures.means(sums["oracle"])["coverage"] == pytest.approx(
        (required <= 2.0).double().mean().item()
    )


def test_a_fixed_temperature_ties_with_itself_and_a_better_policy_wins():
    tokens = make_tokens()
    grid = [0.2, 0.5, 1.0, 1.5, 2.0]
    required = required_temperature(tokens.stats(), 0.1)
    policies = {str(T): torch.full((N,), T) for T in grid}
    sums = measure(tokens, **policies, oracle=(required * 1.001).clamp(max=2.0))
    fixed = [sums[str(T)] for T in grid]
    same = measures.compare(sums["1.0"], fixed, "temperature")
    assert abs(same.difference) < 1e-6
    assert same.low < 1e-6 < 1e-5 + same.high
    better = measures.compare(sums["oracle"], fixed, "temperature")
    assert better.difference > 0
    assert better.low > 0
    assert better == measures.compare(sums["oracle"], fixed, "temperature")


def test_one_document_says_nothing_of_others():
    tokens = make_tokens()
    tokens.document = torch.zeros_like(tokens.document)
    sums = measure(tokens, low=torch.full((N,), 0.5), high=torch.full((N,), 1.0))
    found = measures.compare(sums["low"], list(sums.values()), "kept_set_size")
    assert (found.low, found.high) == (-1.0, 1.0)


def test_equal_cost_is_linear_between_temperatures():
    curve = torch.tensor(
        [[[0.2, 0.5, 0, 0], [0.6, 1.0, 0, 0], [0.8, 2.0, 0, 0]]], dtype=torch.float64
    )

    def at(x):
        return measures.at_equal(curve, 1, torch.tensor([x], dtype=torch.float64)).item()

    assert at(0.75) == pytest.approx(0.4)
    assert at(1.5) == pytest.approx(0.7)
    assert (at(0.1), at(9.0)) == (0.2, 0.8)  # outside the curve: its ends


def oracle_domain() -> Domain:
    """Of a head that knows what is required."""
    tokens = make_tokens()
    required = required_temperature(tokens.stats(), 0.1).numpy()
    return Domain("made", tokens, required, required, required, np.zeros(N))


def test_v_curve_rises_with_the_gap():
    d = oracle_domain()
    curve = v_curve(d, 0.1, 2.0)
    gaps, low, predicted, high = zip(*curve)
    required = [gap / -math.log(0.1) for gap in gaps]
    assert gaps[0] == 0
    assert list(gaps) == sorted(gaps)
    assert predicted == pytest.approx(required)
    assert max(required) <= 2.0
    assert all(a <= b for a, b in zip(low, high))


def test_v_curve_of_tokens_out_of_reach_is_empty():
    d = oracle_domain()
    d.required = np.full(N, 3.0)
    assert v_curve(d, 0.1, 2.0) == []
