"""`sample` against the samplers people use; the limit is one read of the logits, out of memory, or
out of the caches where they are warm.

"peaked" logits have a standard deviation of 3, a few tokens survive the cut; "flat" ones 0.1, all
survive. A warm call follows up to five of the same sampler, a cold one a call of another sampler;
on a GPU all begin with an empty second-level cache.
"""

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from autodeco_fast import sample
from autodeco_fast.kernels import sample as kernels
from autodeco_fast.kernels import subtile_maxima
from bench import peers
from bench.limits import LARGE, SMALL, read_bandwidth
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


class Replay:
    """Replays a CUDA graph of a call, captured the first time."""

    def __init__(self, call: Callable[[], object]):
        self.call, self.graph = call, None

    def __call__(self) -> None:
        if self.graph is None:
            for _ in range(3):
                self.call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.call()
            self.graph = graph
        self.graph.replay()


def one_by_one(call: Callable[[], object]) -> Callable[[], object]:
    """The call with every kernel launched when the one ahead has ended: what the early launch
    (`kernels/dependent_launch.py`) is compared with."""

    def run() -> object:
        with (
            mock.patch.object(kernels, "dependent", return_value=False),
            mock.patch.object(subtile_maxima, "dependent", return_value=False),
        ):
            return call()

    return run


@pytest.mark.parametrize("caches", ["cold"] if ON_GPU else ["warm", "cold"])
@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize(("logits", "V"), CASES)
def test_sample(logits, V, B, caches, take_turns, compiled, tiny):
    B, V = (min(B, 4), 999) if tiny else (B, V)
    torch.manual_seed(0)
    z = (torch.randn(B, V, device=device()) * DEVIATION[logits]).to(DTYPE)
    compiled_sample = compiled(eager_sample)
    variants = {
        "sample": lambda: sample(z, T, min_p=MIN_P, seed=1),
        "logits.amax(-1)": lambda: z.amax(-1),
        "transformers": lambda: transformers_sample(z.float(), T, min_p=MIN_P),
        "softmax + multinomial": lambda: eager_sample(z, T, MIN_P),
        "softmax + multinomial, torch.compile": lambda: compiled_sample(z, T, MIN_P),
        **peers.samplers(z, T, min_p=MIN_P),
    }
    if ON_GPU:
        graphs = [name for name in ("sample", "FlashInfer") if name in variants]
        variants |= {f"{name}, graph": Replay(variants[name]) for name in graphs}
        variants["sample, one by one, graph"] = Replay(one_by_one(variants["sample"]))
    n_bytes = z.numel() * z.element_size()
    read = n_bytes if caches == "warm" else SMALL if tiny else LARGE
    take_turns(
        variants,
        group=f"sample, {logits}, B={B}, V={V}, {caches}",
        burst=6 if caches == "warm" else 1,
        limit=n_bytes / read_bandwidth(read),
        logits=logits,
        B=B,
        V=V,
        dtype=str(DTYPE).removeprefix("torch."),
        bytes=n_bytes,
        caches=caches,
        temperature=T,
        min_p=MIN_P,
    )
