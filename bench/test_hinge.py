"""The Min-P hinge, forward and backward; the limit is 16 bytes read and 4 written a row forward, 20
and 4 backward, at the bandwidth of a copy."""

import pytest
import torch

from autodeco_fast import TokenStats, min_p_hinge_loss
from bench.limits import LARGE, SMALL, copy_bandwidth
from bench.machine import device
from tests.reference.peers import eager_hinge, gradients

BYTES = 44  # a row


@pytest.mark.parametrize("N", [8192, 1 << 20])
def test_min_p_hinge(N, take_turns, compiled, tiny):
    N = 64 if tiny else N
    torch.manual_seed(0)
    T = torch.rand(N, device=device(), requires_grad=True)
    gap = torch.rand(N, device=device()) * 6
    rank, zero = torch.ones(N, dtype=torch.long, device=device()), torch.zeros_like(gap)
    stats = TokenStats(gap, rank, zero, gap, rank, zero)
    compiled_hinge = compiled(eager_hinge)
    take_turns(
        {
            "min_p_hinge": gradients(lambda: min_p_hinge_loss(T, stats), T),
            "eager torch": gradients(lambda: eager_hinge(T, gap, rank), T),
            "torch.compile": gradients(lambda: compiled_hinge(T, gap, rank), T),
        },
        group=f"hinge, forward and backward, N={N}",
        limit=BYTES * N / copy_bandwidth(SMALL if tiny else LARGE),
        N=N,
        dtype="float32",
        bytes=BYTES * N,
    )
