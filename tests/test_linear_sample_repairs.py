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
from autodeco_fast.kernels.candidates import best_candidate, next_open
from autodeco_fast.sampling import SamplingParameters
from tests.on_device import DEVICE, on_device
from tests.reference import staircase
from tests.reference.sampling import gumbel, reference, uniform_bits


@triton.jit
def _count_open(float_ptr, code_ptr, out_ptr, n, c, block: tl.constexpr, block_n: tl.constexpr):
    """Tiles whose bound s₂ reaches the best score."""
    row = tl.program_id(0).to(tl.int64)
    _, tau, score, _, _, _ = best_candidate(float_ptr, code_ptr, row, n, c, block, block_n)
    claim, tile = next_open(float_ptr, row, n, tau, float("inf"), -1, block_n)
    count = 0
    while (claim >= score) & (claim > -float("inf")):
        count += 1
        claim, tile = next_open(float_ptr, row, n, tau, claim, tile, block_n)
    tl.store(out_ptr + row, count)


class _Watched:
    """A kernel that remembers what it was last launched with."""

    def __init__(self, kernel):
        self.kernel, self.arguments = kernel, ()

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.arguments = arguments
            return self.kernel[grid](*arguments, **options)

        return launch


def cut_up(B: int, V: int, splits: int | None = None) -> dict[str, int]:
    """How the launcher cuts V."""
    return {"block": module.BLOCK, "depth": module.splits_of(B, V, splits)[1]}


def test_the_simulation_is_the_kernels_rule(monkeypatch):
    """Partials, open tiles and tokens; rows of this case do need a second look."""
    B, V, T, min_p, splits, seed = 16, 500, 6.0, 0.8, 2, 3
    z = torch.randn(B, V, generator=torch.Generator().manual_seed(3))
    watched = _Watched(module._settle)
    monkeypatch.setattr(module, "_settle", watched)
    parameters = SamplingParameters(temperature=T, min_p=min_p, seed=seed, stream=None)
    # One-hot hidden states pick a column of the weight: the logits are z bit for bit.
    out = on_device(module.linear_sample)(
        torch.eye(B), z.T.contiguous(), None, 1.0, None, parameters, splits=splits
    )
    floats, codes = watched.arguments[8:10]
    n, c, shape = floats.shape[2], T * math.log(min_p), cut_up(B, V, splits)
    row, ids = torch.arange(B)[:, None].numpy(), torch.arange(V)[None].numpy()
    noise = torch.from_numpy(gumbel(uniform_bits(seed, 0, row, ids, 0))).float()
    tiles = [staircase.in_tiles(x, shape["block"]) for x in (z, z + T * noise)]
    kept = staircase.kept_of_tiles(*tiles, c, shape["depth"])
    assert n == kept.maximum.shape[1]
    assert torch.equal(floats[0].cpu(), kept.maximum)
    for k in (0, 1):
        scores, logits = floats[1 + 2 * k].cpu(), floats[2 + 2 * k].cpu()
        torch.testing.assert_close(scores, kept.scores[k], rtol=0, atol=1e-5)
        there = kept.scores[k] > -float("inf")
        assert torch.equal(logits[there], kept.logits[k][there])
        column = ((codes.cpu() >> (8 * k)) & 255).long()
        found = tiles[0].gather(2, column[..., None])[..., 0]
        assert torch.equal(found[there], kept.logits[k][there])
    opened = torch.empty(B, dtype=torch.int32, device=DEVICE)
    _count_open[(B,)](floats, codes, opened, n, c, shape["block"], 16)
    count, score = staircase.repairs(z, noise, T, c, **shape)
    assert torch.equal(count > 0, opened.cpu() > 0)
    assert 0 < (count > 0).sum() < B
    want, margin = reference(z, torch.full((B,), T), min_p, seed)
    assert margin.min() > 1e-5
    assert out.token.tolist() == want.tolist()
    won = (z + T * noise).gather(1, want[:, None])[:, 0]
    torch.testing.assert_close(won, score, rtol=0, atol=1e-5)


def whole_row(z, g, T, c):
    return torch.where(z >= z.amax(1, keepdim=True) + c, z + T * g, -float("inf")).amax(1)


@given(
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 1.0, 3.0]),
    c=st.sampled_from([0.0, -0.5, -2.0, -float("inf")]),
    coarse=st.booleans(),
)
def test_two_steps_and_repairs_are_exact(seed, spread, c, coarse):
    """Whatever the order in which the steps come; coarse values tie in logit and score."""
    g = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, 30, 96, generator=g)
    z = spread * z
    if coarse:
        z, noise = z.round(), noise.round()
    _, score = staircase.repairs(z, noise, 2.0, c, block=16, depth=3)
    assert torch.equal(score, whole_row(z, noise, 2.0, c))


@pytest.mark.parametrize("broken", ["the runner-up is trusted", "no tile is opened"])
def test_a_rule_that_looks_too_little_is_caught(broken, monkeypatch):
    """The control."""
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 2000, 96, generator=g)
    case, shape = (z, noise, 2.0, -1.0), {"block": 16, "depth": 3}
    honest = staircase.repairs(*case, **shape)[1]
    assert torch.equal(honest, whole_row(*case))
    original = staircase.kept_of_tiles

    def wrong(*arguments):
        left = original(*arguments)
        if broken == "no tile is opened":
            none = torch.full_like(left.maximum, -float("inf"))
            return left._replace(scores=(left.scores[0], none))
        return left._replace(logits=(left.logits[0], left.maximum))

    monkeypatch.setattr(staircase, "kept_of_tiles", wrong)
    assert not torch.equal(staircase.repairs(*case, **shape)[1], honest)


@pytest.mark.parametrize("B", [1, 64, 128])
def test_repairs_are_rare(B):
    """Far below 5 % of rows for logits of deviation 1 to 3, V = 151,936, in the splits of B
    rows."""
    rows, V = 6, 151_936
    g = torch.Generator().manual_seed(B)
    normal = torch.randn(rows, V, generator=g)
    noise = -torch.empty(rows, V).exponential_(generator=g).log()
    seen = []
    for deviation, T, min_p in itertools.product((1.0, 2.0, 3.0), (0.5, 1.2), (0.02, 0.2)):
        z = deviation * normal
        count, score = staircase.repairs(z, noise, T, T * math.log(min_p), **cut_up(B, V))
        assert torch.equal(score, whole_row(z, noise, T, T * math.log(min_p)))
        seen.append((count > 0).float().mean().item())
    assert sum(seen) / len(seen) <= 0.02
