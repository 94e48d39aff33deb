"""`sample` against the samplers people use; the limit is one read of the logits.

"peaked" logits have a standard deviation of 3, a few tokens survive the cut; "flat" ones 0.1, all
survive. A warm call follows five of the same sampler, a cold one a call of another sampler (on a
GPU both begin with empty caches).
"""

import functools
from collections.abc import Callable

import pytest
import torch

from autodeco_fast import sample
from bench.limits import read_bandwidth
from bench.machine import device
from tests.reference.peers import eager_sample, transformers_sample

ON_GPU = device() == "cuda"
T, MIN_P = 0.7, 0.1
DEVIATION = {"peaked": 3.0, "flat": 0.1}
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCHES = (1, 8, 64, 128, 512) if ON_GPU else (1, 8, 64)
CASES = [
    *(("peaked", V) for V in (151_936, 128_256, 201_088, 262_208)),
    ("flat", 151_936),
]


@functools.cache
def compiled_sample() -> Callable:
    return torch.compile(eager_sample)


def flashinfer_sample() -> Callable | None:
    """Its softmax and its Min-P, where it is installed."""
    try:
        from flashinfer import sampling
    except ImportError:
        return None
    return lambda z: sampling.min_p_sampling_from_probs(sampling.softmax(z, T), MIN_P)


def replayed(call: Callable) -> Callable:
    """Replays a CUDA graph of the call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def variants_of(z: torch.Tensor) -> dict[str, Callable]:
    variants = {
        "sample": lambda: sample(z, T, min_p=MIN_P, seed=1),
        "logits.amax(-1)": lambda: z.amax(-1),
        "transformers": lambda: transformers_sample(z.float(), T, min_p=MIN_P),
        "softmax + multinomial": lambda: eager_sample(z, T, MIN_P),
        "softmax + multinomial, torch.compile": lambda: compiled_sample()(z, T, MIN_P),
    }
    if not ON_GPU:
        return variants
    if flashinfer := flashinfer_sample():
        variants["FlashInfer"] = lambda: flashinfer(z)
    graphs = {
        f"{n}, graph": replayed(variants[n]) for n in ("sample", "FlashInfer") if n in variants
    }
    return variants | graphs


@pytest.mark.parametrize("caches", ["warm", "cold"])
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize(("logits", "V"), CASES)
def test_sample(logits, V, B, caches, take_turns, tiny):
    B, V = (min(B, 4), 999) if tiny else (B, V)
    torch.manual_seed(0)
    z = (torch.randn(B, V, device=device()) * DEVIATION[logits]).to(DTYPE)
    n_bytes = z.numel() * z.element_size()
    take_turns(
        variants_of(z),
        group=f"sample, {logits}, B={B}, V={V}, {caches}",
        burst=6 if caches == "warm" else 1,
        limit_seconds=n_bytes / read_bandwidth(1 << 20 if tiny else 1 << 30),
        **{"logits": logits, "B": B, "V": V, "dtype": str(DTYPE), "bytes": n_bytes},
        **{"caches": caches, "temperature": T, "min_p": MIN_P},
    )
