"""Row statistics against an fp64 reference, on both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autodeco_fast
from tests.on_device import logit_stats
from tests.reference.stats import IGNORE, assert_matches, reference


def make(N, V, dtype=torch.float32, spread=4.0, seed=0):
    g = torch.Generator().manual_seed(seed + N * V)
    x = (torch.randn(N, V, generator=g) * spread).to(dtype)
    y = torch.randint(0, V, (N,), generator=g)
    return x, y


@pytest.mark.parametrize("N, V", [(1, 1), (3, 5), (7, 999), (4, 4096), (5, 4097), (2, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_fp64(N, V, dtype, backend):
    x, y = make(N, V, dtype)
    y[::3] = IGNORE
    assert_matches(logit_stats(x, y, backend=backend), reference(x, y), 20)


@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_transform_comes_before_the_padding_mask(softcap, scale, backend):
    x, y = make(4, 37, spread=20)
    expected = reference(x, y, scale, softcap)
    stats = logit_stats(x, y, logit_scale=scale, softcap=softcap, backend=backend)
    for got, want in zip(
        stats[3:6:2], expected[3:6:2]
    ):  # logsumexp, entropy: softcapped values tie in fp32
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("V", [1, 37, 5000])
def test_at_a_temperature(V, spread, backend):
    x, y = make(5, V, spread=spread)
    y[3] = IGNORE
    T = torch.tensor([0.02, 0.4, 1.0, 1.5, 2.0])
    stats = logit_stats(x, y, temperature=T, min_p=0.1, backend=backend)
    want = reference(x, y, T=T.double(), min_p=0.1)
    assert stats.temperature.tolist() == T.tolist()
    assert stats.kept.tolist() == want[9].tolist()
    # relative to the size of z/T, of which the logsumexp is made
    for got, exact in zip(stats[7:9], want[7:9]):
        error = (got.double() - exact).abs() / (x.abs().amax(-1) / T).clamp(min=1.0)
        assert error.max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_brief_temperature_is_the_number_it_stands_for(dtype, backend):
    x, y = make(4, 300)
    T = torch.tensor([0.01, 0.3, 0.7, 0.9], dtype=dtype)
    brief, wide = (logit_stats(x, y, temperature=t, backend=backend) for t in (T, T.float()))
    assert torch.equal(brief.temperature, wide.temperature)
    for got, want in zip(brief[7:9], wide[7:9]):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_temperature_that_is_none_gives_nan(backend):
    x, y = make(3, 50)
    T = torch.tensor([torch.inf, torch.nan, 0.5])
    stats = logit_stats(x, y, temperature=T, backend=backend)
    for field in (*stats[7:9], stats.scaled_log_mass, stats.scaled_log_prob):
        assert field.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("T", [0.01, 0.05, 0.7])
def test_at_a_low_temperature_nothing_cancels(T, backend):
    """Entropy and log-probability: as far off as torch's in fp32 at most twice."""
    x, _ = make(8, 1000, spread=3)
    x, T = x + 25.0, torch.full((8,), T)
    y = x.topk(2).indices[:, 1]
    stats = logit_stats(x, y, temperature=T, backend=backend)
    ours = stats.scaled_entropy, stats.scaled_log_prob
    theirs, exact = (entropy_and_log_prob(x.to(kind) / T[:, None], y) for kind in KINDS)
    for got, plain, want in zip(ours, theirs, exact):
        assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 2e-7


KINDS = torch.float32, torch.float64


def entropy_and_log_prob(z, y):
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(1, y[:, None])[:, 0]


def test_gradient_of_the_temperature():
    x, y = make(4, 50)
    T = torch.tensor([0.3, 0.8, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def run(t):
        stats = logit_stats(x.double(), y, temperature=t, backend="torch")
        return *stats[7:9], stats.scaled_log_mass, stats.scaled_log_prob

    assert torch.autograd.gradcheck(run, (T,))
    low = torch.full((4,), 1e-3, dtype=torch.float64, requires_grad=True)  # clamped: no gradient
    (gradient,) = torch.autograd.grad(
        logit_stats(x.double(), y, temperature=low).scaled_logsumexp.sum(), low
    )
    assert not gradient.any()


def test_gradient_is_the_same_on_both_backends():
    x, y = make(6, 300)
    y[2] = IGNORE
    gradients = []
    for backend in ("torch", "triton"):
        T = torch.linspace(0.2, 2.0, 6).requires_grad_()
        stats = logit_stats(x, y, temperature=T, backend=backend)
        (stats.scaled_logsumexp.sum() + 3.0 * stats.scaled_entropy.sum()).backward()
        gradients.append(T.grad)
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)
    assert gradients[0][2] == 0


def test_extreme_equal_and_minus_inf(backend):
    x = torch.zeros(4, 70)
    x[1] = 1e4
    x[2] = -float("inf")
    x[2, 17] = 2.0
    x[3, 3], x[3, 5] = 1e4, -1e4
    y = torch.tensor([4, 4, 17, 3])
    stats = logit_stats(x, y, backend=backend)
    assert stats.argmax.tolist() == [0, 0, 17, 3]
    assert stats.rank.tolist() == [0, 0, 0, 0]
    log_v = torch.tensor(70.0).log()
    torch.testing.assert_close(
        stats.entropy, torch.stack([log_v, log_v, log_v * 0, log_v * 0]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        stats.logsumexp, torch.tensor([log_v, 1e4 + log_v, 2.0, 1e4]), rtol=0, atol=2e-3
    )


def test_all_ignored_and_no_rows(backend):
    x, _ = make(3, 11)
    stats = logit_stats(x, torch.full((3,), IGNORE), backend=backend)
    assert stats.rank.tolist() == [-1, -1, -1]
    assert all(
        not s.any()
        for s in (stats.max_logit, stats.argmax, stats.target_logit, stats.logsumexp, stats.entropy)
    )
    assert logit_stats(x[:0], torch.zeros(0, dtype=torch.long), backend=backend).rank.shape == (0,)


def test_strided_rows(backend):
    x, y = make(6, 300)
    part, ids = x[::2, 100:200], y[::2] % 100
    assert_matches(logit_stats(part, ids, backend=backend), reference(part, ids), 20)
    t = x.T.contiguous().T  # no unit stride along V
    assert_matches(logit_stats(t, y, backend=backend), reference(x, y), 20)


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 700),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.sampled_from(["torch", "triton"]),
)
def test_any_shape(N, V, spread, backend):
    x, y = make(N, V, spread=spread)
    assert_matches(logit_stats(x, y, backend=backend), reference(x, y), 5 * spread)


def test_compiles_without_a_break():
    x, y = make(3, 50)
    compiled = torch.compile(
        lambda a, b: logit_stats(a, b, backend="torch"), fullgraph=True, backend="aot_eager"
    )
    assert_matches(compiled(x, y), reference(x, y), 20)


def test_says_what_is_wrong():
    x, y = make(3, 50)
    with pytest.raises(ValueError, match=r"target must be \[3\] int64, got \(2,\)"):
        logit_stats(x, y[:2])
    with pytest.raises(ValueError, match=r"target ids must be in \[0, 50\) or -100, got 50"):
        autodeco_fast.logit_stats(
            x, torch.tensor([0, 50, 1])
        )  # checked on CPUs; elsewhere it would need a sync
    with pytest.raises(ValueError, match=r"softcap must be in \(0, 1e30\], or None, got 0"):
        logit_stats(x, y, softcap=0.0)
