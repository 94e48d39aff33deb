"""What the measures of a policy mean, on logits small enough to do by hand."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from autodeco_fast import logit_stats, required_temperature
from autodeco_fast.training import measures
from autodeco_fast.training.report_data import spearman
from autodeco_fast.training.scan_store import TENSORS, Scan, ScanTokens
from autodeco_fast.training.token_uniform import held_out
from tests.scans import make_scan


class Logits:
    """A base model whose hidden states are its logits."""

    vocabulary = 40

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


def tokens(n: int = 300, V: int = 40) -> ScanTokens:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, V, generator=g) * 3
    y = z.softmax(-1).multinomial(1, generator=g)[:, 0]
    stats = logit_stats(z, y)
    return ScanTokens(
        hidden=z,
        gap=stats.gap,
        target_prob=stats.target_prob,
        entropy=stats.entropy,
        rank=stats.rank,
        target=y,
        document=torch.arange(n) % 7,
        position=torch.arange(n),
    )


def test_measures_follow_their_definitions():
    t, T = tokens(), 0.8
    z = t.hidden.double()
    p = (z / T).softmax(-1)
    inside = p >= 0.1 * p.amax(-1, keepdim=True)

    def at_target(x):
        return x.gather(1, t.target[:, None])[:, 0]

    sums = measures.sums_by_document(t, Logits(), {"x": torch.full((300,), T)}, min_p=0.1)
    got = measures.means(sums["x"])
    assert got["coverage"] == pytest.approx(at_target(inside).double().mean().item())
    assert got["temperature"] == pytest.approx(T, rel=1e-6)
    assert got["kept_set_size"] == pytest.approx(inside.sum(-1).double().mean().item())
    assert got["nll"] == pytest.approx(-at_target(p).log().mean().item(), rel=1e-5)
    assert sums["x"][:, 4].tolist() == torch.bincount(t.document).tolist()


def test_a_sample_is_read_without_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "SAMPLE", 50)
    scan = Scan(make_scan(tmp_path))
    whole = scan.load()
    monkeypatch.setattr(Scan, "load", None)
    assert len(scan.rows(torch.tensor([], dtype=torch.long))) == 0
    held = held_out(3, whole.document, 0.3)
    for sample, of in (
        (measures._sample(scan), whole),
        (measures._sample(scan, 3, 0.3), whole[held]),
    ):
        expected = of[measures.sample_of(of)]
        assert len(sample) == 50
        assert all(torch.equal(getattr(sample, n), getattr(expected, n)) for n in TENSORS)


def test_weights_speak_for_what_is_not_there():
    """A token of weight 3 is three tokens."""
    t, T = tokens(), torch.rand(300)
    weight = torch.ones(300)
    weight[::4] = 3.0
    thrice = torch.arange(300).repeat_interleave(weight.long())
    ours = measures.sums_by_document(t, Logits(), {"x": T}, min_p=0.1, weight=weight)["x"]
    want = measures.sums_by_document(t[thrice], Logits(), {"x": T[thrice]}, min_p=0.1)["x"]
    torch.testing.assert_close(ours, want)
    unweighted = measures.sums_by_document(t, Logits(), {"x": T}, min_p=0.1)["x"]
    assert measures.means(unweighted) != pytest.approx(measures.means(ours), rel=1e-3)


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.9, 0.99])
def test_the_width_of_a_nucleus(mass):
    """The kept set at it has the mass, and at any lower temperature less."""
    t = tokens()
    z = t.hidden.double()
    width = measures.nucleus_widths(t, Logits(), mass=mass, min_p=0.1).double()

    def mass_at(T):
        kept = z >= z.amax(-1, keepdim=True) + T[:, None] * math.log(0.1)
        return (z.softmax(-1) * kept).sum(-1)

    assert (mass_at(width * (1 + 1e-5) + 1e-5) >= mass - 1e-6).all()
    wider = width > 0
    assert (mass_at(width * (1 - 1e-5) - 1e-5)[wider] < mass + 1e-6).all()
    gap = -measures._gap_of_mass(z - z.amax(-1, keepdim=True), mass, most=3)
    torch.testing.assert_close(gap / math.log(0.1), width, rtol=1e-5, atol=1e-5)


def test_rank_correlation_is_spearman_s():
    g = np.random.default_rng(0)
    x = g.integers(0, 20, 200).astype(float)  # with ties
    y = x + g.normal(size=200) * 8
    want = scipy.stats.spearmanr(x, y).statistic
    assert spearman(x, y) == pytest.approx(want, abs=1e-12)
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert spearman(x, np.zeros(200)) is None


def test_the_oracle_covers_whatever_can_be_reached():
    t = tokens()
    T_star = required_temperature(t.stats(), 0.1)
    sums = measures.sums_by_document(t, Logits(), {"oracle": None}, min_p=0.1)
    assert measures.means(sums["oracle"])["coverage"] == pytest.approx(
        (T_star <= 2.0).double().mean().item()
    )


def test_a_fixed_temperature_ties_with_itself_and_a_better_policy_wins():
    t = tokens()
    grid = [0.2, 0.5, 1.0, 1.5, 2.0]
    T_star = required_temperature(t.stats(), 0.1)
    policies = {str(T): torch.full((300,), T) for T in grid} | {
        "oracle": (T_star * 1.001).clamp(max=2.0)
    }
    sums = measures.sums_by_document(t, Logits(), policies, min_p=0.1)
    fixed = [sums[str(T)] for T in grid]
    difference, low, high = measures.compare(sums["1.0"], fixed, 1, seed=0)
    assert abs(difference) < 1e-6
    assert low < 1e-6 < 1e-5 + high
    difference, low, _ = measures.compare(sums["oracle"], fixed, 1, seed=0)
    assert difference > 0
    assert low > 0
    assert measures.compare(sums["oracle"], fixed, 1, seed=0) == measures.compare(
        sums["oracle"], fixed, 1, seed=0
    )


def test_equal_cost_is_linear_between_temperatures():
    curve = torch.tensor(
        [[[0.2, 0.5, 0, 0], [0.6, 1.0, 0, 0], [0.8, 2.0, 0, 0]]], dtype=torch.float64
    )

    def at(x):
        return measures.fixed_at_equal(curve, 1, torch.tensor([x], dtype=torch.float64)).item()

    assert at(0.75) == pytest.approx(0.4)
    assert at(1.5) == pytest.approx(0.7)
    assert (at(0.1), at(9.0)) == (0.2, 0.8)  # outside the curve: its ends


def test_one_document_says_nothing_of_others():
    t = tokens()
    t.document = torch.zeros_like(t.document)
    policies = {str(T): torch.full((300,), T) for T in (0.5, 1.0)}
    sums = measures.sums_by_document(t, Logits(), policies, min_p=0.1)
    difference, low, high = measures.compare(sums["0.5"], list(sums.values()), 2, seed=0)
    assert (low, high) == (-1.0, 1.0)
    assert abs(difference) < 1e-6


def test_a_flat_curve_is_no_division_by_zero():
    curve = torch.tensor([[[0.2, 0.1, 1, 0], [0.4, 0.2, 1, 0]]], dtype=torch.float64)
    assert measures.fixed_at_equal(curve, 2, torch.ones(1, dtype=torch.float64)).item() == 0.2
