"""The hinge without labels, forward and backward, from logits; the limit is one read of the logits.

Two are made: on a GPU the second comes out of the cache while a row fits there.
"""

import pytest
import torch

from autodeco_fast import nucleus_width_loss
from bench.limits import LARGE, SMALL, read_bandwidth
from bench.machine import device
from tests.reference.peers import eager_nucleus_width, gradients

ON_GPU = device() == "cuda"
SHAPES = [(256, 151_936), (2048, 151_936), (2048, 262_208)] if ON_GPU else [(256, 151_936)]


@pytest.mark.parametrize("dtype", ("bfloat16", "float32") if ON_GPU else ("float32",))
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_nucleus_width(N, V, dtype, take_turns, compiled, tiny):
    N, V = (4, 999) if tiny else (N, V)
    torch.manual_seed(0)
    z = (torch.randn(N, V, device=device()) * 3).to(getattr(torch, dtype))
    T = torch.rand(N, device=device(), requires_grad=True)
    compiled_width = compiled(eager_nucleus_width)
    n_bytes = z.numel() * z.element_size()
    take_turns(
        {
            "nucleus_width": gradients(lambda: nucleus_width_loss(T, z), T),
            "eager torch": gradients(lambda: eager_nucleus_width(T, z), T),
            "torch.compile": gradients(lambda: compiled_width(T, z), T),
        },
        group=f"nucleus_width, N={N}, V={V}, {dtype}",
        limit=n_bytes / read_bandwidth(SMALL if tiny else LARGE),
        N=N,
        V=V,
        dtype=dtype,
        bytes=n_bytes,
    )
