"""Moments of the cut distribution: softmax(z/T) over the kept set alone, against masking in fp64,
from logits and from hidden states, on both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autodeco_fast
from tests.on_device import logit_stats, token_stats
from tests.reference.stats import IGNORE, cut_reference


def case(N, V, spread=4.0, seed=0):
    g = torch.Generator().manual_seed(seed + N * V)
    y = torch.randint(0, V, (N,), generator=g)
    y[1::4] = IGNORE
    return torch.randn(N, V, generator=g) * spread, y, torch.linspace(0.02, 2.0, N)


def assert_close(stats, x, y, T, min_p):
    """`kept` exactly; logsumexp relative to the size of z/T, of which it is made."""
    logsumexp, entropy, kept = cut_reference(x, y, T.double(), min_p)
    assert stats.kept.tolist() == kept.tolist()
    error = (stats.scaled_logsumexp.double() - logsumexp).abs()
    assert (error / (x.abs().amax(-1) / T).clamp(min=1.0)).max() < 2e-6
    torch.testing.assert_close(stats.scaled_entropy.double(), entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("min_p", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("N, V", [(1, 1), (5, 37), (5, 4097), (3, 5000)])
def test_matches_masking(N, V, min_p, backend):
    x, y, T = case(N, V)
    stats = logit_stats(x, y, temperature=T, min_p=min_p, cut=True, backend=backend)
    assert_close(stats, x, y, T, min_p)
    plain = logit_stats(x, y, temperature=T, min_p=min_p, backend=backend)
    for name in (*stats._fields[:7], "kept"):
        assert torch.equal(getattr(stats, name), getattr(plain, name)), name


@settings(max_examples=20)
@given(
    st.integers(1, 5),
    st.integers(1, 600),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.floats(1e-4, 0.9),
    st.sampled_from(["torch", "triton"]),
)
def test_any_shape(N, V, spread, min_p, backend):
    x, y, T = case(N, V, spread)
    # A token on the edge of the kept set would be in or out by a rounding.
    edge = (x.double() - x.double().amax(-1, keepdim=True)) / T[:, None].double()
    x[(edge - torch.tensor(min_p).log()).abs() < 1e-4] = -50.0 * spread
    stats = logit_stats(x, y, temperature=T, min_p=min_p, cut=True, backend=backend)
    assert_close(stats, x, y, T, min_p)


@pytest.mark.parametrize("fused", [True, False], ids=["streaming", "chunked"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("N, H, V", [(6, 24, 301), (3, 7, 3000), (140, 16, 70)])
def test_of_a_product(N, H, V, softcap, fused, backend):
    g = torch.Generator().manual_seed(N)
    h, w, b = (torch.randn(*shape, generator=g) for shape in ((N, H), (V, H), (V,)))
    _, y, T = case(N, V)
    z = 0.5 * (h.double() @ w.double().T + b.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    options = {"bias": b, "logit_scale": 0.5, "softcap": softcap, "chunk_bytes": 40 * V}
    at = {"temperature": T, "min_p": 0.2, "cut": True}
    stats = token_stats(h, w, y, **options, **at, fused=fused, backend=backend)
    logsumexp, entropy, kept = cut_reference(z, y, T.double(), 0.2)
    assert stats.kept.tolist() == kept.tolist()
    assert ((stats.scaled_logsumexp.double() - logsumexp).abs() * T).max() < 5e-5
    assert ((stats.scaled_entropy.double() - entropy).abs() * T).max() < 5e-5


@pytest.mark.parametrize("name, capability", [("HOPPER", 9), ("BLACKWELL", 10)])
def test_variants_of_the_kernel(name, capability):
    from autodeco_fast.kernels import token_stats as kernel
    from tests.on_device import DEVICE

    variant = getattr(kernel, name)
    if variant.specialize and not kernel.COMPILES_SPECIALIZED:
        pytest.skip("needs Triton 3.7")
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < capability:
        pytest.skip(f"needs a GPU of capability {capability}")
    g = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 64, generator=g).bfloat16().to(DEVICE) for n in (5, 300))
    nowhere = torch.full((5,), -1, device=DEVICE)
    threshold = (h.float() @ w.float().T).amax(-1) - 4.0
    rest = nowhere, threshold, torch.linspace(0.5, 4.0, 5, device=DEVICE), None, 1.0, None, True
    floats, ints = kernel.token_stats(h, w, *rest, variant=variant)
    expected, expected_ints = kernel.token_stats(h, w, *rest, variant=kernel.POINTERS)
    assert torch.equal(ints, expected_ints)
    torch.testing.assert_close(floats, expected, rtol=2e-5, atol=2e-5)


def test_gradients_are_closed_forms():
    """∂logsumexp/∂T = −E[z]/T² and ∂H/∂T = Var(z)/T³ over the set, which stays as it is."""
    x, y, _ = case(4, 50)
    x = x.double()
    T = torch.tensor([0.3, 0.8, 1.0, 1.9], dtype=torch.float64, requires_grad=True)

    def run(t):
        stats = logit_stats(x, y, temperature=t, min_p=0.05, cut=True, backend="torch")
        return stats.scaled_logsumexp, stats.scaled_entropy

    assert torch.autograd.gradcheck(run, (T,), eps=1e-7, atol=1e-5)


def test_gradient_is_that_of_masking(backend):
    x, y, T = case(8, 300)
    ours, exact = T.clone().requires_grad_(), T.double().requires_grad_()
    stats = logit_stats(x, y, temperature=ours, min_p=0.1, cut=True, backend=backend)
    logsumexp, entropy, _ = cut_reference(x, y, exact, 0.1)
    for got, want in ((stats.scaled_logsumexp, logsumexp), (stats.scaled_entropy, entropy)):
        (a,) = torch.autograd.grad(got.sum(), ours, retain_graph=True)
        (b,) = torch.autograd.grad(want.sum(), exact, retain_graph=True)
        torch.testing.assert_close(a.double() * T * T, b * T * T, rtol=1e-5, atol=2e-5)


def test_one_survivor_and_greedy_rows(backend):
    """One token in the set: entropy 0, no gradient. Greedy rows too, even where maxima tie."""
    x = torch.zeros(4, 70)
    x[0, 5] = 40.0
    x[2, 7] = x[2, 9] = 3.0
    T = torch.tensor([1.0, 1.0, 5e-4, 0.0]).requires_grad_()
    y = torch.tensor([5, 4, 7, 3])
    stats = logit_stats(x, y, temperature=T, min_p=0.1, cut=True, backend=backend)
    of_all = torch.tensor([0.0, 70.0, 0.0, 0.0]).clamp(min=1).log()
    torch.testing.assert_close(stats.scaled_entropy, of_all)
    log_prob = stats.target_logit / stats.temperature - stats.scaled_logsumexp
    torch.testing.assert_close(log_prob, -of_all)
    (gradient,) = torch.autograd.grad((log_prob + stats.scaled_entropy).sum(), T)
    torch.testing.assert_close(gradient, torch.zeros(4), rtol=0, atol=1e-6)


def test_minus_infinity_is_never_in_the_set(backend):
    x, y, T = case(4, 60)
    x[:, 30:] = -torch.inf
    y = y.clamp(max=29)
    for min_p in (0.0, 0.1):
        stats = logit_stats(x, y, temperature=T, min_p=min_p, cut=True, backend=backend)
        _, entropy, kept = cut_reference(x, y, T.double(), min_p)
        assert stats.kept.tolist() == kept.tolist()
        torch.testing.assert_close(stats.scaled_entropy.double(), entropy, rtol=0, atol=1e-5)
        assert stats.scaled_logsumexp.isfinite().all()


def test_keeps_no_graph_where_none_is_wanted():
    x, y, T = case(3, 20)
    with torch.no_grad():
        stats = logit_stats(x, y, temperature=T.requires_grad_(), min_p=0.1, cut=True)
    assert not stats.scaled_logsumexp.requires_grad


def test_compiles_without_a_break():
    x, y, T = case(3, 50)

    def run(x, y, T):
        stats = logit_stats(x, y, temperature=T, min_p=0.1, cut=True, backend="torch")
        return stats.scaled_logsumexp, stats.scaled_entropy, stats.kept

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x, y, T), run(x, y, T)):
        assert torch.equal(a, b)


def test_says_what_is_missing():
    x, y, T = case(3, 20)
    h, w = torch.randn(3, 4), torch.randn(20, 4)
    for call in (
        lambda **o: autodeco_fast.logit_stats(x, y, cut=True, **o),
        lambda **o: autodeco_fast.token_stats(h, w, y, cut=True, **o),
    ):
        for options in ({}, {"temperature": T}):
            with pytest.raises(ValueError, match="cut needs min_p and a temperature"):
                call(**options)
    with pytest.raises(ValueError, match="cut must be one of"):
        autodeco_fast.logit_stats(x, y, temperature=T, min_p=0.1, cut="yes")
