"""Maxima of sub-tiles against torch's, and draws from given ones: the tokens of `sample` without
them, on both backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autodeco_fast
from autodeco_fast.sampling import SUBTILE
from tests.on_device import on_device, sample

subtile_maxima = on_device(autodeco_fast.subtile_maxima)
ASKED = {"return_logprob": True, "return_kept": True, "return_full_logprob": True}


def logits_of(B: int, V: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(B, V, generator=torch.Generator().manual_seed(B * V)) * 3).to(dtype)


def expected(z: torch.Tensor) -> torch.Tensor:
    """NaN where one is, as torch has it."""
    z = torch.nn.functional.pad(z.float(), (0, -z.shape[1] % SUBTILE), value=-float("inf"))
    return z.unflatten(1, (-1, SUBTILE)).amax(-1)


def some_bits(B: int, V: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(V)
    return torch.randint(-(2**31), 2**31, (B, -(-V // 32)), generator=g).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, V", [(1, 1), (3, 255), (2, 256), (1, 257), (2, 2500), (0, 300)])
def test_they_are_the_maxima(B, V, dtype, backend):
    z = logits_of(B, V, dtype)
    maxima = subtile_maxima(z, backend=backend)
    assert maxima.dtype == torch.float32
    assert torch.equal(maxima, expected(z))


def test_of_what_is_allowed_and_no_padding(backend):
    z, bits = logits_of(3, 700), some_bits(3, 600)
    allowed = (bits[:, torch.arange(600) // 32] >> (torch.arange(600) % 32).int()) & 1 == 1
    want = expected(z[:, :600].masked_fill(~allowed, -float("inf")))
    assert torch.equal(subtile_maxima(z, token_bitmask=bits, vocab_size=600, backend=backend), want)


def test_what_is_not_finite(backend):
    z = logits_of(4, 600)
    z[0, 5] = z[1, 599] = float("nan")
    z[2, 300] = float("inf")
    z[3, 256:512] = -float("inf")
    want = expected(z).tolist()
    want[0][0] = want[1][2] = float("inf")
    assert subtile_maxima(z, backend=backend).tolist() == want


@settings(max_examples=25)
@given(
    st.integers(1, 4),
    st.integers(1, 1500),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(["torch", "triton"]),
    st.sampled_from(["torch", "triton"]),
)
def test_the_same_tokens(B, V, min_p, backend, from_backend):
    """Whichever backend they come from."""
    z, T = logits_of(B, V), torch.linspace(0.0, 1.5, B)
    maxima = subtile_maxima(z, backend=from_backend)
    options = {"min_p": min_p, "seed": V, "return_logprob": True, "backend": backend}
    for ours, want in zip(sample(z, T, maxima=maxima, **options), sample(z, T, **options)):
        assert ours is want is None or torch.equal(ours, want)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 7}, {"top_p": 0.8}])
def test_the_same_of_everything_else(cuts, backend):
    """With masks and cuts, everything asked for, rows that are not well, and NaN for +inf, as
    `amax` has it; maxima of any stride."""
    z, bits = logits_of(5, 900), some_bits(5, 900)
    z[1, 300], z[2, 5], z[3, 700] = float("nan"), float("inf"), -float("inf")
    z[4] = -float("inf")
    allowed = (bits[:, torch.arange(900) // 32] >> (torch.arange(900) % 32).int()) & 1 == 1
    maxima = expected(z.masked_fill(~allowed, -float("inf")))
    T = torch.tensor([0.7, 0.0, 1.0, 1.5, 1.0])
    options = {"min_p": 0.02, "seed": 4, "token_bitmask": bits, **cuts, "backend": backend}
    want = sample(z, T, **options, **ASKED)
    for given_maxima in (maxima, maxima.T.contiguous().T, torch.stack([maxima] * 2, -1)[..., 1]):
        for ours, exact in zip(sample(z, T, **options, **ASKED, maxima=given_maxima), want):
            assert torch.equal(ours, exact)
        assert torch.equal(sample(z, T, **options, maxima=given_maxima).token, want.token)


def test_they_are_believed(backend):
    """The control: those of other logits give other tokens, so they are what is looked at."""
    z = logits_of(6, 700)
    wrong = subtile_maxima(z, backend=backend) - 20.0
    assert (
        sample(z, 1.0, min_p=0.5, seed=0, maxima=wrong, backend=backend, return_kept=True).kept
        > sample(z, 1.0, min_p=0.5, seed=0, backend=backend, return_kept=True).kept
    ).any()


def test_compiles_without_a_break():
    z = logits_of(3, 700)

    def draw(z):
        maxima = autodeco_fast.subtile_maxima(z, backend="torch")
        return autodeco_fast.sample(z, 0.7, seed=4, maxima=maxima, backend="torch").token

    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(z), draw(z))


@pytest.mark.parametrize(
    ("maxima", "got"),
    [
        (torch.zeros(2, 2), r"\(2, 2\) torch.float32 on cpu"),
        (torch.zeros(3), r"\(3,\) torch.float32 on cpu"),
        (torch.zeros(2, 3).double(), r"\(2, 3\) torch.float64 on cpu"),
        (torch.zeros(2, 3, device="meta"), r"\(2, 3\) torch.float32 on meta"),
    ],
)
def test_says_what_is_wrong(maxima, got):
    with pytest.raises(ValueError, match=rf"maxima must be \[2, 3\] float32 on cpu, got {got}"):
        autodeco_fast.sample(torch.zeros(2, 700), 1.0, seed=0, maxima=maxima)
    with pytest.raises(ValueError, match=r"maxima must be a tensor, got 3\.0"):
        autodeco_fast.sample(torch.zeros(2, 700), 1.0, seed=0, maxima=3.0)
    with pytest.raises(ValueError, match=r"logits must be \[B, V\]"):
        autodeco_fast.subtile_maxima(torch.zeros(3))
