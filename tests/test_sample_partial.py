"""A vocabulary split over ranks: merged draws are those of the whole; a merge that skips the second
look is caught."""

import itertools

import pytest
import torch

from autodeco_fast import merge_samples, sample, sample_partial, target_logits
from tests.on_device import on_device

part_of, merged, whole = on_device(sample_partial), on_device(merge_samples), on_device(sample)


def case(B: int = 256, V: int = 480):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(B, V, generator=g)
    T = torch.rand(B, generator=g) * 2
    T[::9] = 0.0
    return z, T, {"min_p": 0.4, "seed": 7, "position": 3}


def shards(z: torch.Tensor, n: int):
    """(first id, logits) of n parts, unequal, all but the last a multiple of 4 wide."""
    width = z.shape[1] // n // 4 * 4
    edges = [*range(0, width * n, width), z.shape[1]]
    return [(a, z[:, a:b]) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_draws_are_those_of_the_whole(ranks, backend):
    z, T, options = case(256 if backend == "torch" else 24)  # the interpreter runs a program a row
    want = whole(z, T, **options, backend=backend).token

    def draw(**more):
        return [
            part_of(x, T, first_id=a, **options, **more, backend=backend)
            for a, x in shards(z, ranks)
        ]

    parts = draw()
    token, still_open = merged(parts, T, min_p=0.4)
    assert torch.equal(token[~still_open], want[~still_open])
    if ranks == 1:
        assert not still_open.any()
        return
    assert still_open.any()
    assert (token != want).any()  # the control: without a second look some of them are wrong
    maximum = torch.stack([p.maximum for p in parts]).amax(0)
    token, still_open = merged(draw(maximum=maximum), T, min_p=0.4)
    assert not still_open.any()
    assert torch.equal(token, want)


def test_a_known_maximum_needs_one_round(backend):
    z, T, options = case(64 if backend == "torch" else 24)
    parts = [
        part_of(x, T, first_id=a, **options, maximum=z.amax(-1), backend=backend)
        for a, x in shards(z, 3)
    ]
    token, still_open = merged(parts, T, min_p=0.4)
    assert not still_open.any()
    assert torch.equal(token, whole(z, T, **options, backend=backend).token)


def test_a_part_may_hold_nothing(backend):
    z, T, options = case(8)
    z[:, :240] = -float("inf")
    parts = [part_of(x, T, first_id=a, **options, backend=backend) for a, x in shards(z, 2)]
    assert (parts[0].score == -float("inf")).all()
    token, _ = merged(parts, T, min_p=0.4)
    assert torch.equal(token, whole(z, T, **options, backend=backend).token)


def test_compiles_without_a_break():
    z, w, y = torch.randn(4, 64), torch.randn(64, 64), torch.arange(4)

    def call(z: torch.Tensor, w: torch.Tensor):
        part = sample_partial(z, 0.8, first_id=64, min_p=0.1, seed=3, backend="torch")
        return *part, target_logits(z, w, y, first_id=2, backend="torch")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(z, w), call(z, w), strict=True))


def test_says_what_is_wrong():
    with pytest.raises(ValueError, match="first_id must be a multiple of 4 and ≥ 0, got 6"):
        sample_partial(torch.zeros(1, 8), 1.0, first_id=6, seed=0)
    with pytest.raises(ValueError, match=r"maximum must be \[1\] float32"):
        sample_partial(torch.zeros(1, 8), 1.0, first_id=0, seed=0, maximum=torch.zeros(2))
