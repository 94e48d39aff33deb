"""The ops of a training step one by one: `logit_stats`, the temperature head, the hinge.

logit_stats       limit: one read of the logits
temperature head  limit: its first matrix product, and two such products with the backward
hinge             limit: 16 bytes read and 4 written a row forward, 20 and 4 backward
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from autodeco_fast import TemperatureHead, TokenStats, logit_stats, min_p_hinge_loss
from bench.limits import copy_bandwidth, read_bandwidth
from bench.machine import device
from tests.reference.peers import eager_head, eager_hinge, eager_stats


def gradients(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable:
    """Forward and backward of `loss()`."""
    return lambda: torch.autograd.grad(loss(), leaves)


def test_logit_stats(take_turns, tiny):
    N, V = (4, 999) if tiny else (256, 151_936)
    torch.manual_seed(0)
    z = torch.randn(N, V, device=device()) * 3
    y = torch.randint(0, V, (N,), device=device())
    compiled = torch.compile(eager_stats)
    n_bytes = z.numel() * z.element_size()
    take_turns(
        {
            "logit_stats": lambda: logit_stats(z, y),
            "eager torch": lambda: eager_stats(z, y),
            "torch.compile": lambda: compiled(z, y),
        },
        group=f"logit_stats, N={N}, V={V}",
        limit_seconds=n_bytes / read_bandwidth(1 << 20 if tiny else 1 << 30),
        **{"N": N, "V": V, "dtype": "float32", "bytes": n_bytes},
    )


def test_temperature_head(take_turns, tiny):
    N, H = (16, 32) if tiny else (8192, 896)
    torch.manual_seed(0)
    h, head = torch.randn(N, H, device=device()), TemperatureHead(H).to(device())
    torch.nn.init.normal_(head.mlp[2].weight, std=0.1)
    w1, weights = head.mlp[0].weight.detach(), tuple(head.parameters())
    compiled = torch.compile(lambda x: eager_head(x, head.mlp))
    g = torch.randn(N, 256, device=device())
    facts = {"N": N, "H": H, "dtype": "float32", "limit_seconds": "product alone"}
    with torch.no_grad():
        take_turns(
            {
                "temperature_head": lambda: head(h),
                "eager torch": lambda: eager_head(h, head.mlp),
                "product alone": lambda: F.linear(h, w1),
                "torch.compile": lambda: compiled(h),
            },
            group=f"temperature head, forward, N={N}, H={H}",
            flops=2 * N * H * 256,
            **facts,
        )
    take_turns(
        {
            "temperature_head": gradients(lambda: head(h).sum(), *weights),
            "eager torch": gradients(lambda: eager_head(h, head.mlp).sum(), *weights),
            "product alone": lambda: (F.linear(h, w1), g.T @ h),
            "torch.compile": gradients(lambda: compiled(h).sum(), *weights),
        },
        group=f"temperature head, forward and backward, N={N}, H={H}",
        flops=4 * N * H * 256,
        **facts,
    )


def test_min_p_hinge(take_turns, tiny):
    N = 64 if tiny else 1 << 20
    torch.manual_seed(0)
    T = torch.rand(N, device=device(), requires_grad=True)
    gap = torch.rand(N, device=device()) * 6
    rank, zero = torch.ones(N, dtype=torch.long, device=device()), torch.zeros_like(gap)
    stats = TokenStats(gap, rank, zero, gap, rank, zero)
    compiled = torch.compile(eager_hinge)
    take_turns(
        {
            "min_p_hinge": gradients(lambda: min_p_hinge_loss(T, stats), T),
            "eager torch": gradients(lambda: eager_hinge(T, gap, rank), T),
            "torch.compile": gradients(lambda: compiled(T, gap, rank), T),
        },
        group=f"hinge, forward and backward, N={N}",
        limit_seconds=44 * N / copy_bandwidth(1 << 20 if tiny else 1 << 30),
        **{"N": N, "dtype": "float32", "bytes": 44 * N},
    )
