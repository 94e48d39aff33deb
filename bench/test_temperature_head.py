"""The temperature head; the limit is its first matrix product, with the backward two such."""

import pytest
import torch
import torch.nn.functional as F

from autodeco_fast import TemperatureHead
from bench.machine import device
from tests.reference.peers import eager_head, gradients

ON_GPU = device() == "cuda"
WIDTH = 256
SHAPES = [(1, 4096), (64, 4096), (8192, 896), (8192, 4096)] if ON_GPU else [(1, 896), (8192, 896)]


@pytest.fixture
def case(N, H, tiny) -> tuple[int, int, torch.Tensor, TemperatureHead]:
    N, H = (16, 32) if tiny else (N, H)
    torch.manual_seed(0)
    head = TemperatureHead(H).to(device())
    torch.nn.init.normal_(head.mlp[2].weight, std=0.1)
    return N, H, torch.randn(N, H, device=device()), head


@pytest.mark.parametrize(("N", "H"), SHAPES)
def test_temperature_head_forward(case, take_turns, compiled):
    N, H, h, head = case
    compiled_head = compiled(eager_head)
    w1 = head.mlp[0].weight.detach()
    with torch.no_grad():
        take_turns(
            {
                "temperature_head": lambda: head(h),
                "eager torch": lambda: eager_head(h, head.mlp),
                "product alone": lambda: F.linear(h, w1),
                "torch.compile": lambda: compiled_head(h, head.mlp),
            },
            group=f"temperature head, forward, N={N}, H={H}",
            limit="product alone",
            N=N,
            H=H,
            dtype="float32",
            bytes=4 * H * (N + WIDTH),
            flops=2 * N * H * WIDTH,
        )


@pytest.mark.parametrize(("N", "H"), SHAPES[-1:])
def test_temperature_head_backward(case, take_turns, compiled):
    N, H, h, head = case
    compiled_head = compiled(eager_head)
    weights = tuple(head.parameters())
    w1, g = weights[0].detach(), torch.randn(N, WIDTH, device=device())
    take_turns(
        {
            "temperature_head": gradients(lambda: head(h).sum(), *weights),
            "eager torch": gradients(lambda: eager_head(h, head.mlp).sum(), *weights),
            "product alone": lambda: (F.linear(h, w1), g.T @ h),
            "torch.compile": gradients(lambda: compiled_head(h, head.mlp).sum(), *weights),
        },
        group=f"temperature head, forward and backward, N={N}, H={H}",
        limit="product alone",
        N=N,
        H=H,
        dtype="float32",
        bytes=8 * H * (N + WIDTH),
        flops=4 * N * H * WIDTH,
    )
