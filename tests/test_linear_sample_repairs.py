"""How often `linear_sample` multiplies a split again: the kernels' rule, its simulation in
`tests/reference/staircase.py`, and a count at a real vocabulary."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from autodeco_fast.kernels import linear_sample as module
from autodeco_fast.kernels.candidates import best_candidate
from autodeco_fast.sampling import SamplingParameters
from tests.on_device import DEVICE, on_device
from tests.reference import staircase
from tests.reference.sampling import gumbel, reference, uniform_bits


@triton.jit
def _store_claims(float_ptr, int_ptr, out_ptr, S, c, block_s: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _, _, score, _, _, b_open, _ = best_candidate(float_ptr, int_ptr, row, S, c, block_s)
    again = (b_open >= score) & (b_open > -float("inf"))
    tl.store(out_ptr + row, tl.sum(again.to(tl.int32), 0))


class _Watched:
    """A kernel that remembers what it was last launched with."""

    def __init__(self, kernel):
        self.kernel, self.arguments = kernel, ()

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.arguments = arguments
            return self.kernel[grid](*arguments, **options)

        return launch


def sub_tiles(B: int, V: int, splits: int | None = None) -> dict[str, int]:
    """How the launcher cuts V, in sub-tiles: those are looked at one after the other."""
    depth = module.splits_of(B, V, splits)[1]
    return {"block": module.WIDTH, "depth": depth * module.BLOCK // module.WIDTH}


def test_the_simulation_is_the_kernels_rule(monkeypatch):
    """Partials, claims and tokens; rows of this case do need a second look."""
    B, V, T, min_p, splits = 48, 1000, 1.5, 0.3, 4
    g = torch.Generator().manual_seed(3)
    z = torch.randn(B, V, generator=g)
    watched = _Watched(module._settle)
    monkeypatch.setattr(module, "_settle", watched)
    parameters = SamplingParameters(temperature=T, min_p=min_p, seed=11, stream=None)
    # One-hot hidden states pick a column of the weight: the logits are z bit for bit.
    out = on_device(module.linear_sample)(
        torch.eye(B), z.T.contiguous(), None, 1.0, None, parameters, splits=splits
    )
    floats, ints = watched.arguments[8:10]
    S, c = floats.shape[2], T * math.log(min_p)
    row, ids = torch.arange(B)[:, None].numpy(), torch.arange(V)[None].numpy()
    s = z + T * torch.from_numpy(gumbel(uniform_bits(11, 0, row, ids, 0))).float()
    shape = sub_tiles(B, V, splits)
    assert -(-V // (shape["block"] * shape["depth"])) == S
    tiles = (staircase.in_tiles(x, **shape) for x in (z, s))
    kept = staircase.kept_of_splits(*tiles, c)
    assert torch.equal(floats[0].cpu(), kept.maximum)
    for k in (0, 1):
        torch.testing.assert_close(floats[1 + 2 * k].cpu(), kept.scores[k], rtol=0, atol=1e-5)
        assert torch.equal(floats[2 + 2 * k].cpu(), kept.logits[k])
    claims = torch.empty(B, dtype=torch.int32, device=DEVICE)
    _store_claims[(B,)](floats, ints, claims, S, c, 16)
    count, score = staircase.repairs(z, s, c, **shape)
    assert torch.equal(claims.cpu() > 0, count > 0)
    assert 0 < (count > 0).sum() < B
    want, margin = reference(z, torch.full((B,), T), min_p, 11)
    assert margin.min() > 1e-5
    assert out.token.tolist() == want.tolist()
    torch.testing.assert_close(s.gather(1, want[:, None])[:, 0], score, rtol=0, atol=1e-5)


def whole_row(z, s, c):
    return torch.where(z >= z.amax(1, keepdim=True) + c, s, -float("inf")).amax(1)


@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 1.0, 3.0]),
    c=st.sampled_from([0.0, -0.5, -2.0, -float("inf")]),
    coarse=st.booleans(),
)
def test_two_steps_and_repairs_are_exact(seed, spread, c, coarse):
    """Whatever the order in which the steps come; coarse values tie in logit and score."""
    g = torch.Generator().manual_seed(seed)
    z, s = spread * torch.randn(2, 30, 96, generator=g)
    if coarse:
        z, s = z.round(), s.round()
    _, score = staircase.repairs(z, s, c, block=4, depth=4)
    assert torch.equal(score, whole_row(z, s, c))


def test_a_runner_up_that_may_not_be_the_best_is_caught(monkeypatch):
    """The control: a rule that trusts the old runner-up after the winner has passed it."""
    g = torch.Generator().manual_seed(0)
    z, s = torch.randn(2, 2000, 96, generator=g)
    honest = staircase.repairs(z, s, -2.0, block=4, depth=4)[1]
    assert torch.equal(honest, whole_row(z, s, -2.0))
    original = staircase.kept_of_splits

    def trusting(z, s, c):
        left = original(z, s, c)
        unknown = (left.logits[1] == -float("inf")) & (left.scores[1] > -float("inf"))
        assert unknown.any()
        logit = torch.where(unknown, left.maximum, left.logits[1])
        return left._replace(logits=(left.logits[0], logit))

    monkeypatch.setattr(staircase, "kept_of_splits", trusting)
    assert not torch.equal(staircase.repairs(z, s, -2.0, block=4, depth=4)[1], honest)


@pytest.mark.parametrize("B", [1, 64, 128])
def test_repairs_are_rare(B):
    """Below 5 % of rows for logits of deviation 1 to 3, V = 151,936, in the splits of B rows."""
    rows, V = 6, 151_936
    g = torch.Generator().manual_seed(B)
    normal = torch.randn(rows, V, generator=g)
    noise = -torch.empty(rows, V).exponential_(generator=g).log()
    shape = sub_tiles(B, V)
    seen = []
    for deviation, T, min_p in itertools.product((1.0, 2.0, 3.0), (0.5, 1.2), (0.02, 0.2)):
        z = deviation * normal
        count, _ = staircase.repairs(z, z + T * noise, T * math.log(min_p), **shape)
        seen.append((count > 0).float().mean().item())
    assert sum(seen) / len(seen) <= 0.05
