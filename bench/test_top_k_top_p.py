"""`sample` with top-k and top-p before Min-P, against the same in transformers' order; the limit is
one read of the logits.

Peaked fp32 logits (standard deviation 3), T = 0.7.
"""

import pytest
import torch

from autodeco_fast import sample
from bench import peers
from bench.limits import LARGE, SMALL, read_bandwidth
from bench.machine import device
from tests.reference.peers import transformers_sample

T = 0.7
CUTS = {
    "min_p": {"min_p": 0.05},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.95},
    "top_k, top_p, min_p": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
}
BATCHES = (1, 8) if device() == "cpu" else (1, 8, 64, 512)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("V", [128_256, 151_936, 201_088, 262_208])
def test_top_k_top_p(V, B, cuts, take_turns, compiled, tiny):
    V = 999 if tiny else V
    torch.manual_seed(0)
    z, given = torch.randn(B, V, device=device()) * 3.0, CUTS[cuts]
    compiled_sample = compiled(transformers_sample)
    n_bytes = z.numel() * z.element_size()
    take_turns(
        {
            "sample": lambda: sample(z, T, **given, seed=1),
            "transformers": lambda: transformers_sample(z, T, **given),
            "transformers, torch.compile": lambda: compiled_sample(z, T, **given),
            **peers.samplers(z, T, **given),
        },
        group=f"sample, {cuts}, B={B}, V={V}",
        limit=n_bytes / read_bandwidth(SMALL if tiny else LARGE),
        cuts=cuts,
        B=B,
        V=V,
        dtype="float32",
        bytes=n_bytes,
        temperature=T,
    )
