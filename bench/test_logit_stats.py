"""`logit_stats`, six statistics of every row of logits; the limit is one read of the logits.

Losses of other libraries compute a part of them: two, where they return the logsumexp.
"""

import pytest
import torch

from autodeco_fast import logit_stats
from bench import peers
from bench.limits import LARGE, SMALL, read_bandwidth
from bench.machine import device
from tests.reference.peers import eager_stats

ON_GPU = device() == "cuda"
SHAPES = [(256, 151_936), (2048, 151_936), (2048, 262_208)] if ON_GPU else [(256, 151_936)]


@pytest.mark.parametrize("dtype", ("bfloat16", "float32") if ON_GPU else ("float32",))
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_logit_stats(N, V, dtype, take_turns, compiled, tiny):
    N, V = (4, 999) if tiny else (N, V)
    torch.manual_seed(0)
    z = (torch.randn(N, V, device=device()) * 3).to(getattr(torch, dtype))
    target = torch.randint(0, V, (N,), device=device())
    compiled_stats = compiled(eager_stats)
    n_bytes = z.numel() * z.element_size()
    take_turns(
        {
            "logit_stats": lambda: logit_stats(z, target),
            "eager torch": lambda: eager_stats(z, target),
            "torch.compile": lambda: compiled_stats(z, target),
            **peers.cross_entropies(z, target),
        },
        group=f"logit_stats, N={N}, V={V}, {dtype}",
        limit=n_bytes / read_bandwidth(SMALL if tiny else LARGE),
        N=N,
        V=V,
        dtype=dtype,
        bytes=n_bytes,
    )
