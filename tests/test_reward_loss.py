"""The policy gradient in T: against autograd through an explicit masked softmax, and against the
derivative of an expected reward."""

import math

import pytest
import torch

import autodeco_fast
from autodeco_fast import reward_loss, sample
from tests.on_device import logit_stats

MIN_P = 0.05


def masked_log_probs(z: torch.Tensor, T: torch.Tensor, min_p: float) -> torch.Tensor:
    """`[N, V]` ln softmax(z/T) over the kept set at T, which is held fixed; −1e9 outside. fp64."""
    low = z.amax(-1, keepdim=True) + T.detach()[:, None] * torch.tensor(min_p).double().log()
    return (z / T[:, None]).masked_fill(z < low, -1e9).log_softmax(-1)


def case(N=12, V=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(N, V, generator=g, dtype=torch.float64) * 3
    T = torch.linspace(0.3, 1.9, N, dtype=torch.float64).requires_grad_()
    y = masked_log_probs(z, T.detach(), MIN_P).exp().multinomial(1, generator=g)[:, 0]
    A = torch.randn(N, generator=g, dtype=torch.float64)
    return z, T, y, A


def stats_at(z, y, T, cut=True, backend="torch"):
    return logit_stats(z, y, temperature=T, min_p=MIN_P, cut=cut, backend=backend)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_autograd_through_the_masked_softmax(reduction, weighted):
    z, T, y, A = case()
    ignored = torch.arange(len(y)) % 4 == 1
    weight = torch.rand(len(y), dtype=torch.float64) if weighted else None
    stats = stats_at(z, y.masked_fill(ignored, -100), T)
    loss = reward_loss(T, stats, A, entropy_weight=0.3, weight=weight, reduction=reduction)
    log_p = masked_log_probs(z, T, MIN_P)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e6)).sum(-1)
    rows = -A * log_p.gather(1, y[:, None])[:, 0] - 0.3 * entropy
    w = torch.where(ignored, 0.0, torch.ones_like(A) if weight is None else weight)
    exact = {"none": rows * w, "sum": (rows * w).sum(), "mean": (rows * w).sum() / w.sum()}
    torch.testing.assert_close(loss, exact[reduction])
    ours, theirs = (torch.autograd.grad(x.sum(), T)[0] for x in (loss, exact[reduction]))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert not ours[ignored].any()


def test_gradient_on_both_backends(backend):
    z, T, y, A = case()
    exact = torch.autograd.grad(reward_loss(T, stats_at(z, y, T), A, entropy_weight=0.1), T)[0]
    t = T.detach().float().requires_grad_()
    stats = stats_at(z.float(), y, t, backend=backend)
    (got,) = torch.autograd.grad(reward_loss(t, stats, A.float(), entropy_weight=0.1), t)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


def test_signs():
    """A rewarded argmax cools, a rewarded unlikely token warms, a punished one cools; entropy
    warms."""
    z = torch.tensor([[3.0, 2.0, 1.5, 0.0]]).repeat(4, 1)
    T = torch.ones(4, requires_grad=True)
    stats = stats_at(z, torch.tensor([0, 2, 2, 0]), T)
    advantage = torch.tensor([1.0, 1.0, -1.0, 0.0])
    loss = reward_loss(T, stats, advantage, entropy_weight=0.01, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, T)
    assert (gradient.sign() == torch.tensor([1.0, -1.0, 1.0, -1.0])).all()


def expected_reward_gradient(z, T, reward):
    """d/dT of Σ p_T(i)·r_i for one row."""
    t = T.detach().clone().requires_grad_()
    expected = (masked_log_probs(z, t, MIN_P).exp() * reward).sum()
    return torch.autograd.grad(expected, t)[0]


def mean_gradient(z, T, reward, tokens, share, cut=True):
    """Mean gradient of the reward term over tokens sampled from one row, a share each."""
    n = len(tokens)
    t = T.detach().expand(n).clone().requires_grad_()
    baseline = reward.mean()  # any that does not look at the token
    loss = reward_loss(
        t,
        stats_at(z.expand(n, -1), tokens, t, cut=cut)._replace(kept=None),
        reward[tokens] - baseline,
        entropy_weight=0.0,
        weight=share,
        reduction="sum",
    )
    return torch.autograd.grad(loss, t)[0]


@pytest.mark.parametrize("cut", [True, False], ids=["", "broken: moments of the whole vocabulary"])
def test_is_unbiased_over_every_token(cut):
    """The expectation over y, taken exactly: every token with its probability."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(1, 30, generator=g, dtype=torch.float64) * 2
    reward = torch.rand(30, generator=g, dtype=torch.float64)
    T = torch.tensor([1.3], dtype=torch.float64)
    p = masked_log_probs(z, T, MIN_P).exp()[0]
    kept = (p > 0).nonzero()[:, 0]
    assert 3 < len(kept) < 25
    got = mean_gradient(z, T, reward, kept, p[kept], cut=cut).sum()
    exact = expected_reward_gradient(z, T, reward)[0]
    assert torch.isclose(got, -exact, rtol=1e-9) == cut


@pytest.mark.parametrize("broken", [False, True], ids=["", "broken: another temperature"])
def test_is_unbiased_with_our_sampler(broken):
    """Tokens of `sample` at T: within four standard errors; drawn at 0.8·T they are far outside."""
    n, g = 20_000, torch.Generator().manual_seed(5)
    z = torch.randn(1, 30, generator=g, dtype=torch.float64) * 2
    reward = torch.rand(30, generator=g, dtype=torch.float64)
    T = torch.tensor([1.3], dtype=torch.float64)
    at = float(T) * (0.8 if broken else 1.0)
    tokens = sample(z.float().expand(n, -1), at, min_p=MIN_P, seed=1).token
    one_each = mean_gradient(z, T, reward, tokens, torch.ones(n, dtype=torch.float64))
    off = one_each.mean() + expected_reward_gradient(z, T, reward)[0]
    assert (off.abs() > 4 * one_each.std() / n**0.5) == broken


def test_a_token_outside_the_set_has_no_reward_term():
    z = torch.tensor([[5.0, 4.0, -5.0], [5.0, 4.0, -torch.inf]])
    T = torch.ones(2, requires_grad=True)
    stats = stats_at(z, torch.tensor([2, 2]), T)
    loss = reward_loss(T, stats, torch.tensor([3.0, 3.0]), entropy_weight=0.5, reduction="none")
    torch.testing.assert_close(loss, -0.5 * stats.scaled_entropy)
    (gradient,) = torch.autograd.grad(loss.sum(), T)
    assert gradient.isfinite().all()


def test_greedy_rows_have_no_gradient():
    z = torch.randn(3, 20)
    T = torch.tensor([0.0, 5e-4, 9e-3], requires_grad=True)
    loss = reward_loss(T, stats_at(z, z.argmax(-1), T), torch.ones(3), entropy_weight=1.0)
    assert not torch.autograd.grad(loss, T)[0].any()


def test_all_ignored_is_zero():
    z, T, y, A = case()
    stats = stats_at(z, torch.full_like(y, -100), T)
    loss = reward_loss(T, stats, A, entropy_weight=1.0)
    assert loss == 0
    assert not torch.autograd.grad(loss, T)[0].any()


def test_says_what_is_wrong():
    z, T, y, A = case()
    at, plain = stats_at(z, y, T), logit_stats(z, y)
    for call, words in (
        (lambda: reward_loss(T, plain, A, entropy_weight=0.1), "must be taken with temperature="),
        (lambda: reward_loss(T, at, A[:3], entropy_weight=0.1), r"advantage must be \[12\]"),
        (lambda: reward_loss(T, at, A, entropy_weight=math.inf), "entropy_weight must be"),
        (lambda: reward_loss(T, at, A, entropy_weight=0, reduction="x"), "reduction must be one"),
        (lambda: reward_loss(T, z, A, entropy_weight=0), "stats must be TokenStats"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_is_public():
    assert "reward_loss" in autodeco_fast.__all__
