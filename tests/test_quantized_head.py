"""`linear_sample` from an 8-bit copy of the head: the same tokens, bounds that hold, and a bound
that is too small is caught."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autodeco_fast import QuantizedLMHead, linear_sample

DTYPES = [torch.float32, torch.bfloat16]


def case(B: int, H: int, V: int, spread: float = 3.0, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, generator=g), torch.randn(V, H, generator=g) * (spread / H**0.5)


def dyadic(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Multiples of 2^−bits: their products and sums are exact in fp32, whatever the order."""
    return (x * 2**bits).round() / 2**bits


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_same_token_bit_for_bit(min_p, spread):
    """Logits are exact here, so that both products agree in every bit and ties stay ties."""
    h, w = (dyadic(x, 5) for x in case(64, 96, 3000, spread))
    T = torch.linspace(0, 2, 64)
    options = {"min_p": min_p, "seed": 5, "position": 3, "return_logprob": True}
    want = linear_sample(h, w, T, **options, return_kept=True)
    got = linear_sample(h, QuantizedLMHead(w), T, **options, return_kept=True)
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.status, want.status)
    if min_p > 0:
        assert torch.equal(got.kept, want.kept)
        torch.testing.assert_close(got.logprob, want.logprob, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_most_tokens_are_ruled_out(dtype):
    h, w = (x.to(dtype) for x in case(16, 256, 20_000, 4.0))
    head = QuantizedLMHead(w)
    left = head.possible(h, 0.7, 0.1)
    z = (h @ w.T).float()
    kept = z >= z.amax(1, keepdim=True) + 0.7 * torch.tensor(0.1).log()
    assert not (kept & ~left).any()
    assert left.float().mean() < 0.02
    got = linear_sample(h, head, 0.7, min_p=0.1, seed=1).token
    assert (got == linear_sample(h, w, 0.7, min_p=0.1, seed=1, fused=False).token).all()


def products(h: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
    """fp32 logits in several orders of summation, and exact ones."""
    x, y = h.float(), w.float()
    forward, one_by_one = x @ y.T, torch.zeros(len(h), len(w))
    for j in range(x.shape[1]):
        one_by_one += x[:, j : j + 1] * y[:, j]
    return [forward, one_by_one, x.flip(1) @ y.flip(1).T, x.double() @ y.double().T]


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(1, 1, 3), (3, 7, 40), (2, 300, 20), (4, 64, 64)]),
    size=st.sampled_from([1e-30, 1e-12, 1.0, 1e6, 1e15]),
    outlier=st.sampled_from([1.0, 1e3, 1e8]),
    kind=st.sampled_from(["normal", "half codes", "along the error", "cancelling"]),
    dtype=st.sampled_from(DTYPES),
)
def test_bounds_hold(seed, shape, size, outlier, kind, dtype):
    B, H, V = shape
    h, w = case(B, H, V, seed=seed)
    w *= size
    w[:, seed % H] *= outlier
    if kind == "half codes":  # every code is rounded by a half
        w = ((w / size).round() + 0.5).clamp(-126.5, 126.5) / 127 * size
        w[:, 0] = size
    w = w.to(dtype)
    if kind == "along the error":  # where Cauchy-Schwarz is an equality
        head = QuantizedLMHead(w)
        e = w.double() - head.scale[:, None].double() * head.codes.double()
        h = (e[:B] / e[:B].abs().amax(1, keepdim=True).clamp(min=1e-300)).float()
    if kind == "cancelling":
        h[:, ::2] = 1e4
        h[:, 1::2] = -1e4
    h = h.to(dtype)
    low, high = QuantizedLMHead(w).bounds(h)
    for z in products(h, w):
        assert (low <= z).all()
        assert (z <= high).all()


def test_a_bound_that_is_too_small_is_caught():
    """The control: ruled-out tokens that were kept, and other tokens drawn."""
    h, w = (dyadic(x, 5) for x in case(400, 64, 400, 1.0))
    head = QuantizedLMHead(w)
    how = {"min_p": 0.2, "seed": 3}
    want = linear_sample(h, w, 1.0, **how).token
    assert torch.equal(linear_sample(h, head, 1.0, **how).token, want)
    z = h @ w.T
    kept = z >= z.amax(1, keepdim=True) + torch.tensor(0.2).log()
    assert not (kept & ~head.possible(h, 1.0, 0.2)).any()
    head.radius *= 0.02
    assert (kept & ~head.possible(h, 1.0, 0.2)).any()
    low, high = head.bounds(h)
    assert ((z < low) | (z > high)).any()


def test_broken_values_are_reported_as_ever():
    h, w = case(5, 32, 200)
    h[1, 3], h[2, 0] = float("nan"), float("inf")
    options = {"min_p": 0.1, "seed": 2}
    want = linear_sample(h, w, 1.0, **options)
    got = linear_sample(h, QuantizedLMHead(w), 1.0, **options)
    assert got.status.tolist() == want.status.tolist()
    assert got.token.tolist() == want.token.tolist()
    w[7, 2], w[9], w[11, 1] = float("inf"), 0.0, 1e-42
    h[1:3] = 1.0
    want = linear_sample(h, w, 1.0, **options)
    got = linear_sample(h, QuantizedLMHead(w), 1.0, **options)
    assert got.status.tolist() == want.status.tolist()
    assert got.token.tolist() == want.token.tolist()


def test_a_compiled_call_draws_from_the_weight():
    """In one graph, without a look at what is left."""
    h, w = (dyadic(x, 5) for x in case(3, 8, 100))
    head = QuantizedLMHead(w)

    def call(h):
        return linear_sample(h, head, 0.7, min_p=0.1, seed=4).token

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(h), call(h))


def test_less_precise_products_rule_nothing_out():
    h, w = case(2, 16, 100)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert QuantizedLMHead(w).kept_logits(h, 0.5, 0.5).isfinite().all()
    finally:
        torch.set_float32_matmul_precision(precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert QuantizedLMHead(w).kept_logits(h, 0.5, 0.5).isfinite().all()
    assert not QuantizedLMHead(w).kept_logits(h, 0.5, 0.5).isfinite().all()


def test_says_what_is_wrong():
    h, w = case(2, 8, 20)
    with pytest.raises(ValueError, match=r"weight must be \[V, H\] float32 or bfloat16, got shape"):
        QuantizedLMHead(w.half())
    head = QuantizedLMHead(w)
    for options in ({"bias": w[:, 0]}, {"top_k": 3}, {"fused": True}, {"softcap": 3.0}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name} must be left out with a QuantizedLMHead"):
            linear_sample(h, head, 1.0, seed=0, **options)
    with pytest.raises(ValueError, match="weight must have the dtype of hidden"):
        linear_sample(h.bfloat16(), head, 1.0, seed=0)
