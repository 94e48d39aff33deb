"""Policies against plain fp64 references of their formulas, and as text."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.policies import (
    EDT,
    AdaptiveP,
    Cut,
    EntropyRule,
    HeadPolicy,
    MinK,
    PLess,
    Static,
    TopNSigma,
    parse,
    rules,
)
from autodeco_fast.policies.masking import masked
from autodeco_fast.policies.temperature import divisor
from tests.commands import ROOT

INF = float("inf")
TEMPERATURES = (0.3, 1.0, 5.0)


def rows(V: int = 400) -> torch.Tensor:
    """Random rows and hard ones, `[B, V]` fp32."""
    generator = torch.Generator().manual_seed(V)
    noise = torch.randn(8, V, generator=generator)
    z = noise * torch.tensor([[0.01], [0.3], [1], [2], [3], [10], [30], [1]])
    z[2:, :7] += torch.tensor([9.0, 8.5, 8, 7, 6.9, 5, 4])
    z[7] += 500
    masked_rows = z[3:5].clone()
    masked_rows[:, ::3] = -INF
    special = torch.zeros(5, V)  # the first is all ties
    special[1] = -INF
    special[1, V // 2] = 3.0  # one survivor
    special[2, [1, 5]] = 20.0  # a tie at the top
    special[3] = (noise[0] * 3).round()  # ties everywhere
    special[4, :90] = 10 + noise[1, :90] * 0.01  # a cliff far out
    return torch.cat([z, masked_rows, special])


def deviation(z: torch.Tensor) -> torch.Tensor:
    z = z[z.isfinite()]
    return (z - z.mean()).square().mean().sqrt()


def top_n_sigma(policy: TopNSigma, z: torch.Tensor) -> torch.Tensor:
    """The lowest logit kept, of one row in fp64."""
    return z.max() - policy.n * deviation(z)


def p_less(policy: PLess, z: torch.Tensor) -> torch.Tensor:
    scaled = z / policy.temperature
    log_p = scaled.log_softmax(0)
    return policy.temperature * ((2 * log_p).logsumexp(0) + scaled.logsumexp(0))


def min_k(policy: MinK, z: torch.Tensor) -> torch.Tensor:
    down = z[z.isfinite()].sort(descending=True).values
    R = float(down[0] - down[-1])
    steps = [float(a - b) / i for i, (a, b) in enumerate(pairwise(down), 1)] or [0.0]
    k = steps.index(max(steps)) + 1
    fallback = len(down) if R == 0 else min(len(down), math.floor(policy.tau / R))
    return down[max(k, fallback) - 1]


RULES = [
    *((TopNSigma, top_n_sigma, {"n": n}) for n in (0.0, 1.0, 2.5)),
    (PLess, p_less, {}),
    *((MinK, min_k, {"tau": tau}) for tau in (0.0, 3.0, 40.0)),
]


@pytest.mark.parametrize(
    ("kind", "lowest", "options"),
    RULES,
    ids=[f"{kind.kind} {options}" for kind, _, options in RULES],
)
@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize("which", ["masked", "whole"])
def test_cuts_are_their_formulas(kind, lowest, options, T, which):
    policy = kind(temperature=T, **options)
    z = rows()
    if which == "whole":
        z = z[z.amin(1) > -INF]
    scaled = z / T
    got = masked(scaled, policy.cut(scaled)) > -INF
    for row, kept in zip(z.double(), got):
        least = lowest(policy, row)
        # What is exactly at the cut is inside; what is within rounding of it may be either.
        near = (row - least).abs() < 1e-5 * T * (1 + (row[row.isfinite()] / T).abs().max())
        near |= row < row.max() - 87 * T  # so deep a cut is held there
        near &= row != row.max()
        want = row >= least
        assert torch.equal(kept | near, want | near)
        assert kept[row == row.max()].all()
        assert not kept[row == -INF].any()
    if kind is MinK:
        exact = torch.stack([row >= lowest(policy, row) for row in z.double()])
        assert torch.equal(got, exact)


@pytest.mark.parametrize("HEAD", [2, 8, 64, 256, 1000])
def test_min_k_does_not_depend_on_how_much_it_sorts(HEAD, monkeypatch):
    monkeypatch.setattr(rules, "HEAD", HEAD)
    for V in (1, 2, 7, 400):
        z = rows(400)[:, :V] if V < 7 else rows(V)
        want = torch.stack([row >= min_k(MinK(), row) for row in z.double() if row.max() > -INF])
        got = masked(z, MinK().cut(z))[z.amax(1) > -INF] > -INF
        assert torch.equal(got, want)


CUTS = [
    Cut(min_p=0.2),
    Cut(top_k=3),
    Cut(top_p=0.6),
    Cut(min_p=0.05, top_k=9, top_p=0.9),
    Cut(min_p=torch.linspace(0.0, 1.0, 15), top_k=torch.arange(15), top_p=torch.full((15,), 0.7)),
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: " ".join(f for f in cut._fields))
def test_a_masked_row_is_what_the_sampler_keeps(cut):
    z = rows(70)
    out = cut.sample(z, seed=5, return_kept=True)
    inside = masked(z, cut) > -INF
    assert torch.equal(out.kept.long(), inside.sum(1))
    assert inside.gather(1, out.token[:, None]).all()


def test_a_top_p_of_1_masks_nothing():
    """Even where the sum of the first tokens rounds to 1."""
    z = torch.arange(0.0, -40.0, -0.01)[None].repeat(2, 1)
    cut = Cut(top_p=torch.tensor([1.0, 0.999]))
    assert (masked(z, cut) > -INF).sum(1).tolist()[0] == z.shape[1]
    assert (masked(z, cut) > -INF).sum(1).tolist()[1] < 1000


@pytest.mark.parametrize("policy", [TopNSigma(n=1.5), PLess(), MinK(), PLess(min_p=0.5)], ids=str)
def test_rules_draw_from_their_kept_set(policy, backend):
    z = rows(70)
    out = policy.cut(z).sample(z, seed=1, return_kept=True, backend=backend)
    inside = masked(z, policy.cut(z)) > -INF
    assert torch.equal(out.kept.long(), inside.sum(1))
    assert inside.gather(1, out.token[:, None]).all()
    assert (out.status == 0).all()


def test_a_min_p_beside_a_rule_is_a_second_cut():
    z = rows()
    both, rule, min_p = (
        masked(z, cut) > -INF
        for cut in (TopNSigma(n=1, min_p=0.3).cut(z), TopNSigma(n=1).cut(z), Cut(min_p=0.3))
    )
    assert torch.equal(both, rule & min_p)
    assert not torch.equal(both, rule)
    both = masked(z, MinK(min_p=0.3).cut(z)) > -INF
    assert torch.equal(both, (masked(z, MinK().cut(z)) > -INF) & min_p)


def entropies(z: torch.Tensor) -> torch.Tensor:
    log_p = z.double().log_softmax(-1)
    return (log_p.exp() * log_p.clamp(min=-1e9)).sum(-1).abs()


def test_entropy_rules_are_their_formulas():
    z, hidden = rows()[:, None], torch.zeros(15, 1, 4)
    H = entropies(z)
    assert H.min() == 0
    for policy, want in [
        (EntropyRule(a=0.3), 0.3 * H),
        (EntropyRule(a=0.5, power=0.5), 0.5 * H.sqrt()),
        (EDT(t0=0.8, theta=0.1), 0.8 * 0.8 ** (0.1 / H)),
        (EDT(t0=1.5, theta=2.0, n=0.5), 1.5 * 0.5 ** (2.0 / H)),
    ]:
        got = policy.temperatures(hidden, z)
        assert got.shape == (15, 1)
        # Entropies near 0 are differences; their powers magnify them.
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=2e-3)
    assert EDT(t0=1.0, theta=0.1).temperatures(hidden, z)[11] == 0  # one survivor: greedy


def test_every_temperature_is_held_in_its_range():
    hidden = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    head = TemperatureHead(8)
    torch.nn.init.normal_(head.mlp[2].weight, std=3.0)
    T = head(hidden)
    policy = HeadPolicy(head=head, scale=1.5, t_min=0.4, t_max=1.7)
    got = policy.temperatures(hidden)
    assert torch.equal(got, (1.5 * T).clamp(0.4, 1.7))
    assert got.min() == 0.4
    assert got.max() == torch.tensor(1.7)
    assert torch.equal(HeadPolicy(head=head).temperatures(hidden), T)
    assert (Static(temperature=0.5, scale=3.0, t_max=1.2).temperatures(hidden) == 1.2).all()


def test_static_draws_are_those_of_the_sampler():
    from autodeco_fast import sample

    z, hidden = rows()[:9], torch.zeros(9, 4)
    policy = Static(temperature=0.5, min_p=0.02, top_k=6, top_p=0.9)
    got = policy.sample(hidden, z, seed=3, position=7, return_kept=True)
    want = sample(z, 0.5, min_p=0.02, top_k=6, top_p=0.9, seed=3, position=7, return_kept=True)
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.kept, want.kept)
    greedy = Static(temperature=0.0).sample(hidden, z, seed=3).token
    assert torch.equal(greedy, z.argmax(1))


COLD = [
    *("top_n_sigma T=0", "top_n_sigma T=0 n=0", "p_less T=0", "min_k T=0"),
    *("static T=0 top_p=0.5", "entropy a=1e-9"),
]


@pytest.mark.parametrize("text", COLD)
def test_cold_policies_are_greedy(text):
    z = rows() + 1
    z[3, 50:60] = z[3].max()  # ties go to the lowest id
    got = parse(text).sample(torch.zeros(15, 4), z, seed=9).token
    assert torch.equal(got, z.argmax(1))


# Adaptive-p


def adaptive_weights(z, policy: AdaptiveP, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the draw, and p, in fp64."""
    p = (z.double() / policy.temperature).softmax(1)
    kept = p >= policy.min_p * p.amax(1, keepdim=True)
    p = torch.where(kept, p, 0.0)
    p /= p.sum(1, keepdim=True)
    aim = (2 * policy.target - mean).clamp(0, 1)
    d = (p - aim[:, None]).abs() / 0.3
    weight = torch.where(kept, (5 - 10 * d**2 / (1 + d)).exp(), 0.0)
    return weight / weight.sum(1, keepdim=True), p


def test_adaptive_p_follows_its_formula_and_its_memory():
    policy = AdaptiveP(target=0.4, decay=0.7, temperature=1.3, min_p=0.03)
    generator = torch.Generator().manual_seed(2)
    running, mean = policy.started(), torch.full((3,), 0.4, dtype=torch.float64)
    for step in range(12):
        z = torch.randn(3, 60, generator=generator) * 2
        cut = running.cut(z / divisor(torch.full((3,), 1.3)))
        want, p = adaptive_weights(z, policy, mean)
        torch.testing.assert_close(cut.logits.softmax(1).double(), want, rtol=1e-4, atol=1e-7)
        token = cut.sample(z, seed=step).token
        running.drawn(token)
        mean = 0.7 * mean + 0.3 * p.gather(1, token[:, None])[:, 0]
        torch.testing.assert_close(running.mean.double(), mean, rtol=1e-5, atol=1e-6)
    assert len(set(mean.tolist())) == 3
    assert policy.started().mean == 0.4  # of another call


@pytest.mark.parametrize(
    ("probabilities", "target"),
    [([0.5, 0.2, 0.15, 0.1, 0.05], 0.3), ([0.9, 0.06, 0.04], 0.5), ([0.97, 0.01, 0.01, 0.01], 0.5)],
)
def test_the_memory_of_adaptive_p_steers_to_the_target(probabilities, target):
    z = torch.tensor([probabilities]).log().expand(64, -1)

    def mean_probability(remembers: bool) -> float:
        running, seen = AdaptiveP(target=target, min_p=0.005).started(), []
        for step in range(80):
            token = running.cut(z).sample(z, seed=step).token
            if remembers:
                running.drawn(token)
            seen.append(z.gather(1, token[:, None]).exp().mean())
        return float(torch.stack(seen[20:]).mean())

    assert abs(mean_probability(True) - target) < 0.05
    assert abs(mean_probability(False) - target) > 0.08


# Text


ROUND = [
    *("greedy", "static T=0.7 min_p=0.1", "static T=1 min_p=0.05 top_k=50 top_p=0.9", "static T=1"),
    *("top_n_sigma T=1.5 n=1", "p_less T=1", "min_k T=2 tau=3", "entropy a=0.3 power=0.5"),
    *("edt t0=0.8 theta=0.1 n=0.8", "edt t0=0.8 theta=0.1 n=0.5 top_p=0.95 scale=0.5"),
    *("adaptive_p T=1 min_p=0.05 target=0.5 decay=0.9", "p_less T=1 min_p=0.1 t_min=0.2 t_max=3"),
    "static T=0.123456789012",
]


@pytest.mark.parametrize("text", ROUND)
def test_text_is_read_back(text):
    policy = parse(text)
    assert set(str(policy).split()) == set(text.split())
    assert str(policy).split()[0] == text.split()[0]
    assert policy.name == str(policy)
    assert parse(str(policy)) == policy


def test_a_head_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "a head"
    TemperatureHead(8, min_p=0.03).save_pretrained(folder)
    policy = parse(f"head='{folder}' scale=0.9 t_min=0.2")
    assert (policy.min_p, policy.scale, policy.t_min, policy.t_max) == (0.03, 0.9, 0.2, None)
    again = parse(str(policy))
    assert str(again) == str(policy)
    assert torch.equal(again.head.mlp[0].weight, policy.head.mlp[0].weight)
    assert parse(f"head='{folder}' min_p=0").min_p == 0
    assert HeadPolicy(head=TemperatureHead(8)).min_p == 0.1
    assert HeadPolicy(head=TemperatureHead(8, min_p=0.2)).min_p == 0.2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "adaptive_p, autodeco=FOLDER, edt, entropy, greedy, head=FOLDER, min_k, p_less, stat"),
        ("hot T=1", "adaptive_p, autodeco=FOLDER, edt, entropy, greedy, head=FOLDER"),
        ("static", "static needs T"),
        ("edt t0=1", "edt needs theta"),
        ("static T=1 n=2", "T, top_k, top_p, min_p, scale, t_min, t_max.*'n=2'"),
        ("static T=1 T=2", "T is given twice"),
        ("static T", "NAME=VALUE, got 'T'"),
        ("static T=hot", "temperature must be a finite number, got 'hot'"),
        ("static T=nan", "temperature must be a finite number"),
        ("static T=-1", "temperature must be ≥ 0, got -1"),
        ("static T=1 top_p=0", r"top_p must be in \(0, 1\]"),
        ("static T=1 top_k=0", "top_k must be at least 1"),
        ("static T=1 top_k=1.5", "top_k must be an integer"),
        ("static T=1 t_min=2 t_max=1", "t_max must be ≥ t_min 2"),
        ("greedy min_p=0.1", "greedy takes no options"),
        ("adaptive_p min_p=0", r"min_p must be in \(0, 1\]"),
        ("head", "head=FOLDER"),
        ("head=", "head=FOLDER"),
        ("autodeco=", "autodeco=FOLDER"),
        ("autodeco=/nowhere top_p=1", "options are top_k, min_p, scale.*got 'top_p=1'"),
        ("head=/nowhere", "head must be a folder or a hub id"),
        ("head=/nowhere hot=1", "options are .*scale.*got 'hot=1'"),
        ('static "T=1', "quotation"),
    ],
)
def test_what_is_no_policy_is_refused_on_one_line(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse(text)
    assert "\n" not in str(error.value)
    assert repr(text) in str(error.value)


def test_policies_need_no_transformers():
    code = "import sys, autodeco_fast.policies; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match="policy must be a text"):
        parse(None)
