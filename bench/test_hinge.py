"""The Min-P hinge, forward and backward; the limit is what ours moves at the bandwidth of a copy: a
row's T, gap and rank read, its loss and slope written; in the backward the slope read, the gradient
written. On a CPU the copy is as large, so that the caches hold it where they hold the rows."""

import pytest
import torch

from autodeco_fast import TokenStats, min_p_hinge_loss
from bench.limits import LARGE, SMALL, copy_bandwidth
from bench.machine import device
from tests.reference.peers import eager_hinge, gradients

BYTES = 16 + 8 + 4 + 4  # a row


@pytest.mark.parametrize("N", [8192, 1 << 20])
def test_min_p_hinge(N, take_turns, compiled, tiny):
    N = 64 if tiny else N
    torch.manual_seed(0)
    T = torch.rand(N, device=device(), requires_grad=True)
    gap = torch.rand(N, device=device()) * 6
    rank, zero = torch.ones(N, dtype=torch.long, device=device()), torch.zeros_like(gap)
    stats = TokenStats(gap, rank, zero, gap, rank, zero)
    copied = BYTES * N // 2 if device() == "cpu" else SMALL if tiny else LARGE
    compiled_hinge = compiled(eager_hinge)
    take_turns(
        {
            "min_p_hinge": gradients(lambda: min_p_hinge_loss(T, stats), T),
            "eager torch": gradients(lambda: eager_hinge(T, gap, rank), T),
            "torch.compile": gradients(lambda: compiled_hinge(T, gap, rank), T),
        },
        group=f"hinge, forward and backward, N={N}",
        limit=BYTES * N / copy_bandwidth(copied),
        N=N,
        dtype="float32",
        bytes=BYTES * N,
    )
