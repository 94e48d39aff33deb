"""`sample` with top-k, top-p, bitmasks and padding, against the fp64 reference and against
transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.on_device import sample
from tests.reference.sampling import assert_same_tokens, kept_set, reference

CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_k": 20, "top_p": 0.9},
]


def logits(B: int, V: int, deviation: float = 3.0) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(V)) * deviation


def bitmask(allowed: torch.Tensor) -> torch.Tensor:
    """bool [B, V] as packed int32."""
    padded = (
        torch.nn.functional.pad(allowed, (0, -allowed.shape[1] % 32)).unflatten(1, (-1, 32)).long()
    )
    words = (padded << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_token_for_token(cuts, min_p, backend):
    z, T = logits(6, 700), torch.tensor([0.0, 0.3, 0.7, 1.0, 1.5, 2.0])
    out = sample(
        z, T, min_p=min_p, seed=5, **cuts, return_kept=True, return_logprob=True, backend=backend
    )
    assert_same_tokens(out.token, *reference(z, T, min_p, 5, **cuts))
    kept = kept_set(z.double(), T.double().clamp(min=1e-3), min_p, **cuts)
    assert out.kept[1:].tolist() == kept.sum(-1)[1:].tolist()
    q = (z.double() / T[:, None]).masked_fill(~kept, -float("inf")).log_softmax(-1)
    torch.testing.assert_close(
        out.logprob[1:].double(), q.gather(1, out.token[:, None])[1:, 0], rtol=0, atol=1e-5
    )


@settings(max_examples=40)
@given(
    st.integers(1, 600),
    st.integers(0, 700),
    st.floats(0.01, 1.0),
    st.floats(0, 1),
    st.sampled_from([0.1, 1.0, 4.0]),
)
def test_keeps_what_sorting_keeps(V, top_k, top_p, min_p, deviation):
    z, T = logits(3, V, deviation), torch.tensor([0.5, 1.0, 1.7])
    out = sample(z, T, min_p=min_p, top_k=top_k, top_p=top_p, seed=1, return_kept=True)
    kept = [
        kept_set(z.double(), T.double(), min_p * f, top_k, top_p * f).sum(-1)
        for f in (1 - 1e-5, 1 + 1e-5)
    ]
    low, high = torch.minimum(*kept), torch.maximum(*kept)
    assert ((low <= out.kept) & (out.kept <= high)).all()  # a token on the edge may fall either way


def test_keeps_what_transformers_keeps(backend):
    """On logits without ties."""
    z = logits(1, 500)
    for T, k, p, min_p in ((0.7, 50, 0.9, 0.02), (1.3, 200, 0.99, 0.0), (1.0, 5, 1.0, 0.1)):
        warpers = [
            TemperatureLogitsWarper(T),
            TopKLogitsWarper(k),
            TopPLogitsWarper(p),
            MinPLogitsWarper(min_p),
        ]
        scores = z
        for warper in warpers:
            scores = warper(None, scores)
        want = scores.isfinite()[0]
        out = sample(z, T, top_k=k, top_p=p, min_p=min_p, seed=0, backend=backend, return_kept=True)
        assert out.kept.item() == want.sum()
        assert want[out.token.item()]


def test_a_setting_a_row(backend):
    z = logits(4, 300)
    T, k, p = (
        torch.tensor([0.5, 1.0, 1.5, 2.0]),
        torch.tensor([0, 5, 50, 7]),
        torch.tensor([0.8, 1.0, 0.9, 0.5]),
    )
    min_p, seeds = torch.tensor([0.1, 0.0, 0.05, 0.0]), torch.tensor([3, 4, 5, 6])
    options = {"return_kept": True, "backend": backend}
    together = sample(z, T, min_p=min_p, top_k=k, top_p=p, seed=seeds, position=9, **options)
    for i in range(4):
        row = {
            "min_p": min_p[i].item(),
            "top_k": k[i].item(),
            "top_p": p[i].item(),
            "seed": seeds[i].item(),
            "stream": 0,
        }
        alone = sample(z[i : i + 1], T[i].item(), position=torch.tensor(9), **row, **options)
        assert (alone.token.item(), alone.kept.item()) == (
            together.token[i].item(),
            together.kept[i].item(),
        )


def test_many_between_the_bounds(backend):
    """More than a bisection in registers takes: the cut comes closer by reading first."""
    z = torch.randn(3, 3000) * 0.1
    z[2] = 0.5  # they never become fewer
    options = {"seed": 0, "return_kept": True, "backend": backend}
    order = z[:2].sort(1, descending=True).values
    assert sample(z, 1.0, top_k=1700, **options).kept.tolist() == [1700, 1700, 3000]
    mass = order.double().softmax(1).cumsum(1)
    kept = (mass < 0.6).sum(1) + 1
    found = sample(z, 1.0, top_p=0.6, **options).kept
    assert (found[:2] - kept).abs().max() <= 1  # sums are in fp32
    assert found[2] == 3000


def test_ties_stand_or_fall_together(backend):
    z = torch.zeros(1, 40)
    z[0, :3] = 1.0
    for cut, kept in (
        ({"top_k": 2}, 3),
        ({"top_k": 4}, 40),
        ({"top_p": 0.01}, 3),
        ({"top_p": 0.5}, 40),
    ):
        assert sample(z, 1.0, seed=0, **cut, return_kept=True, backend=backend).kept.item() == kept


@pytest.mark.parametrize("cuts", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.6}])
def test_a_maximum_of_minus_zero(cuts, backend):
    z = torch.tensor([[-0.0, -1.0, -2.0, -3.0, -4.0, -5.0], [-0.0, 0.0, -0.0, -1.0, -2.0, -3.0]])
    options = {"seed": 1, "return_kept": True, "backend": backend, **cuts}
    assert sample(z, 1.0, **options).kept.tolist() == sample(z + 0.0, 1.0, **options).kept.tolist()


def test_bitmask(backend):
    z = logits(5, 301)
    g = torch.Generator().manual_seed(3)
    allowed = torch.rand(5, 301, generator=g) < 0.2
    allowed[3] = False
    out = sample(
        z,
        0.8,
        min_p=0.05,
        seed=4,
        token_bitmask=bitmask(allowed),
        return_kept=True,
        backend=backend,
    )
    assert out.status.tolist() == [0, 0, 0, 4, 0]
    assert out.token[3] == 0
    masked = z.masked_fill(~allowed, -float("inf"))
    same = sample(masked, 0.8, min_p=0.05, seed=4, return_kept=True, backend=backend)
    assert torch.equal(out.token, same.token)
    assert torch.equal(out.kept, same.kept)
    everything = bitmask(torch.ones(5, 301, dtype=torch.bool))
    plain = sample(z, 0.8, min_p=0.05, seed=4, backend=backend)
    assert torch.equal(
        sample(z, 0.8, min_p=0.05, seed=4, token_bitmask=everything, backend=backend).token,
        plain.token,
    )


def test_what_is_forbidden_is_not_reported(backend):
    z = logits(1, 64)
    z[0, 5], z[0, 6] = float("nan"), float("inf")
    allowed = torch.ones(1, 64, dtype=torch.bool)
    allowed[0, 5:7] = False
    assert (
        sample(z, 1.0, seed=0, token_bitmask=bitmask(allowed), backend=backend).status.item() == 0
    )


def test_padding_is_never_drawn(backend):
    z = logits(4, 320)
    z[:, 300:] = 100.0
    out = sample(z, 1.0, seed=2, vocab_size=300, top_k=50, backend=backend)
    assert torch.equal(
        out.token, sample(z[:, :300].contiguous(), 1.0, seed=2, top_k=50, backend=backend).token
    )
    assert (out.token < 300).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 0.0}, r"top_p must be in"),
        ({"top_k": -1}, r"top_k must be in \[0,"),
        ({"vocab_size": 9}, r"vocab_size must be in \[1, 8\], got 9"),
        (
            {"token_bitmask": torch.zeros(2, 1)},
            r"token_bitmask must be \[2, 1\] int32, got \(2, 1\) torch.float32",
        ),
        (
            {"token_bitmask": torch.zeros(1, 1, dtype=torch.int32)},
            r"token_bitmask must be \[2, 1\] int32, got \(1, 1\)",
        ),
        ({"temperature": float("inf")}, "temperature must be in"),
    ],
)
def test_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        sample(torch.zeros(2, 8), **{"temperature": 1.0, "seed": 0, **options})
