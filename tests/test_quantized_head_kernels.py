"""The kernels that draw from an 8-bit copy of the LM head: the token of the plain kernels, bit for
bit, from the tokens that the copy cannot rule out."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import autodeco_fast
from autodeco_fast import QuantizedLMHead
from autodeco_fast.kernels import quantized_head as module
from autodeco_fast.sampling import SamplingParameters
from tests.allocations import LargestAllocation
from tests.on_device import DEVICE, on_device
from tests.reference.screen import GROUP, bounds, listed, parts_of


def linear_sample(h, w, T, **options):
    """On the device, from the weight or from an 8-bit copy of it."""

    def run(h, w, T, options):
        quantized = options.pop("quantized", False)
        head = QuantizedLMHead(w) if quantized else w
        return autodeco_fast.linear_sample(h, head, T, **options, backend="triton")

    return on_device(run)(h, w, T, options)


def case(B: int, H: int, V: int, dtype: torch.dtype = torch.float32, spread: float = 3.0):
    g = torch.Generator().manual_seed(B + H + V)
    h, w = torch.randn(B, H, generator=g), torch.randn(V, H, generator=g)
    return h.to(dtype), (w * (spread / H**0.5)).to(dtype)


def assert_same(h, w, T, **options) -> None:
    want = linear_sample(h, w, T, **options, fused=True)
    got = linear_sample(h, w, T, **options, quantized=True)
    assert got.token.tolist() == want.token.tolist()
    assert got.status.tolist() == want.status.tolist()


@on_device
def left(h, w, T=0.7, min_p=0.1, splits=None, bound=1.0) -> list[int]:
    """The tokens that the kernels list; with bounds so many times as large."""
    head = QuantizedLMHead(w)
    head.radius, head.length = head.radius * bound, head.length * bound
    parameters = SamplingParameters(temperature=T, min_p=min_p)
    found = module.possible_tokens(h, head, parameters, splits=splits)
    return [v for v in found.tolist() if v < len(w)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, H, V", [(1, 40, 1100), (3, 137, 300), (19, 24, 250), (17, 8, 7)])
def test_token_for_token(B, H, V, dtype):
    """Greedy rows among others; a cut for each row, and one for all."""
    h, w = case(B, H, V, dtype)
    T = torch.linspace(0, 1.5, B) if B > 1 else torch.tensor([0.9])
    assert_same(h, w, T, min_p=0.1, seed=5, position=2)
    min_p = torch.linspace(0.02, 1, B)
    assert_same(h, w, 0.8, min_p=min_p, seed=torch.arange(B), stream=7)


def test_ties_go_to_the_lowest_id():
    """Tokens with the same weight, far apart; logits and scores that are exact."""
    h, w = ((8 * x).round() / 8 for x in case(8, 16, 1100))
    w[600:700] = w[:100]
    w[1050:1100] = w[:50]
    assert_same(h, w, torch.linspace(0, 0.5, 8) * torch.tensor([0, 1] * 4), min_p=0.3, seed=1)


def test_rows_without_a_cut_survive_whole():
    h, w = case(3, 16, 300)
    assert_same(h, w, 1.0, min_p=torch.tensor([0.0, 0.5, 0.0]), seed=2)
    assert left(h, w, min_p=torch.zeros(3)) == list(range(300))


def test_what_the_host_sees_is_drawn_from_the_weight(monkeypatch):
    """No cut, more rows than pay, and what needs the logits."""
    monkeypatch.setattr(module, "_parts", None)
    for rows, options in (
        (4, {}),
        (4, {"min_p": None}),
        (33, {"min_p": 0.1}),
        (4, {"min_p": 0.1, "return_logprob": True}),
    ):
        h, w = case(rows, 16, 40)
        want = linear_sample(h, w, 1.0, **options, seed=3)
        got = linear_sample(h, w, 1.0, **options, seed=3, quantized=True)
        assert got.token.tolist() == want.token.tolist()
        if want.logprob is not None:
            assert torch.equal(got.logprob, want.logprob)
    with pytest.raises(TypeError):  # greedy rows are cut
        linear_sample(h, w, 0.0, seed=3, quantized=True)


def test_broken_values_are_reported_as_ever():
    h, w = case(6, 24, 300)
    h[1, 3], h[2, 0], h[4] = math.nan, math.inf, 0.0
    assert_same(h, w, 1.0, min_p=0.1, seed=2)
    w[7, 2], w[9], w[11, 1], w[13], w[15, 0] = math.inf, 0.0, 1e-42, 1e-38, math.nan
    h[1:3] = 1.0
    assert_same(h, w, 1.0, min_p=0.1, seed=2)
    h[0], h[3], h[5] = 3e38, 1e-30, 1e-42
    assert_same(h, w * 1e3, 1.0, min_p=0.1, seed=2)


def test_parameters_out_of_range_are_reported():
    h, w = case(4, 16, 200)
    T = torch.tensor([1.0, math.nan, 0.5, -1.0])
    min_p = torch.tensor([0.1, 0.1, 2.0, 0.1])
    parameters = SamplingParameters(temperature=T, min_p=min_p, seed=1, stream=None)
    got = on_device(lambda h, w, p: module.quantized_linear_sample(h, QuantizedLMHead(w), p))(
        h, w, parameters
    )
    assert got.status.tolist() == [0, 8, 8, 8]
    assert got.token[1:].tolist() == [0, 0, 0]


def test_no_rows():
    h, w = case(3, 16, 300)
    assert linear_sample(h[:0], w, 1.0, min_p=0.1, seed=0, quantized=True).token.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_add_up(dtype):
    """Exactly, whatever the size; the norms are no smaller than the true ones."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(7, 200, generator=g)
    h *= torch.tensor([1e-20, 1e-3, 1.0, 1.0, 1e4, 1e18, 0.0])[:, None]
    h[3, 5] = 1e4  # an outlier
    h = h.to(dtype)
    parts = torch.empty(2, 7, 200, dtype=torch.int8, device=DEVICE)
    rows = torch.empty(3, 7, device=DEVICE)
    up = 1 + (200 + 16) * 2.0**-23
    module._parts[(7,)](h.to(DEVICE), parts, rows, 200, 200, up, 256)
    parts, rows = parts.cpu(), rows.cpu()
    k, p, s, f = parts_of(h[:6].double())
    assert torch.equal(rows[0, :6, None].double(), k)
    assert torch.equal(parts[:, :6].double(), torch.stack((p, s)))
    assert (parts[:, 6] == 0).all()
    for norm, true in zip(rows[1:, :6].double(), (h[:6].double().norm(dim=1), f.norm(dim=1))):
        assert (norm >= true).all()
        assert (norm <= true * (1 + 1e-4) + 2e-16).all()


def test_lists_what_the_reference_lists():
    """Through several tiles of a program, in rising order."""
    h, w = case(3, 64, 1800)
    for splits in (2, 5):
        want = listed(*bounds(h, QuantizedLMHead(w)), 0.7 * math.log(0.1), 128, splits)
        want = want.nonzero()[:, 0].tolist()
        assert left(h, w, splits=splits) == want
        assert 0 < len(want) < 400


def test_does_not_depend_on_the_splits_or_blocks_of_rows():
    h, w = case(33, 16, 300)
    parameters = SamplingParameters(temperature=1.0, min_p=0.2, seed=3, stream=None)

    def run(h, w, parameters, splits):
        return module.quantized_linear_sample(h, QuantizedLMHead(w), parameters, splits=splits)

    want = linear_sample(h, w, 1.0, min_p=0.2, seed=3, fused=True).token.tolist()
    for splits in (1, 3):
        assert on_device(run)(h, w, parameters, splits).token.tolist() == want


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-2, 1.0, 1e6]),
    kind=st.sampled_from(["normal", "along the error", "along the rest", "outlier", "cancelling"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_token_of_the_kept_set_is_left_out(seed, size, kind, dtype):
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(2, 24, generator=g), torch.randn(300, 24, generator=g) * size
    if kind == "outlier":
        h[:, seed % 24] *= 1e6
    if kind == "cancelling":
        h[:, ::2], h[:, 1::2] = 1e3, -1e3
    head = QuantizedLMHead(w.to(dtype))
    if kind == "along the error":  # where Cauchy–Schwarz is an equality
        e = w.to(dtype).double() - head.scale[:, None].double() * head.codes.double()
        h = (e[:2] / e[:2].abs().amax(1, keepdim=True)).float()
    if kind == "along the rest":
        w[:2] = parts_of(h.to(dtype).double())[3] * size * 1e3
        head = QuantizedLMHead(w.to(dtype))
    h = h.to(dtype)
    z = h.double() @ head.weight.double().T
    low, high = bounds(h, head)
    assert ((low <= z) & (z <= high)).all()
    T = float(z.std())
    there = set(left(h, head.weight, T, 0.2))
    for logits in (z, z.to(dtype).double()):  # as they are, and rounded as they are drawn from
        kept = (logits >= logits.amax(1, keepdim=True) + T * math.log(0.2)).any(0)
        assert set(kept.nonzero()[:, 0].tolist()) <= there


def test_a_bound_that_is_too_small_is_caught():
    """The control: of logits that lie within the errors of the codes one is left out."""
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        h, first = torch.randn(2, 64, generator=g), torch.randn(1, 64, generator=g)
        w = first + 1e-3 * torch.randn(100, 64, generator=g)
        kept = set((h.double() @ w.double().T).argmax(1).tolist())
        assert kept <= set(left(h, w, 0.0))
        if not kept <= set(left(h, w, 0.0, bound=1e-3)):
            return
    pytest.fail("nothing was left out")


def test_holds_far_less_than_the_logits():
    h, w = case(32, 4, 3000)
    h, w = h.to(DEVICE), w.to(DEVICE)
    head = QuantizedLMHead(w)
    with LargestAllocation() as seen:
        autodeco_fast.linear_sample(h, head, 0.5, min_p=0.1, seed=0, backend="triton")
    size = 4 if DEVICE == "cpu" else 1  # the interpreter copies bytes
    assert 0 < seen.numel <= size * 32 * 3000 / GROUP
