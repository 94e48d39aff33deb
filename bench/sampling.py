"""`sample` against the samplers people use: microseconds a call, and its share of one read of the
logits.

    python -m bench.sampling

T = 0.7, Min-P 0.1. "peaked" logits have a standard deviation of 3, a few tokens survive the cut;
"flat" ones 0.1, all survive. A warm call follows five of the same sampler, a cold one a call of
another sampler (on a GPU both begin with empty caches). The physical limit is one read of the
logits at the bandwidth of a plain maximum over 1 GiB; `logits.amax(-1)` is one read by torch. On a
GPU also FlashInfer, where it is installed, and replays of a CUDA graph; kernels launched are
counted by the profiler.
"""

import functools
from collections.abc import Callable

import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper

from autodeco_fast import sample
from bench.harness import device, interleave, read_bandwidth, record

V, T, MIN_P = 151_936, 0.7, 0.1
OTHER_V = (128_256, 201_088, 262_208)
KINDS = {"peaked": 3.0, "flat": 0.1}


def transformers_sampler(logits: torch.Tensor) -> torch.Tensor:
    """What `generate(do_sample=True, temperature=0.7, min_p=0.1)` does a step, from fp32 logits to
    token."""
    scores = MinPLogitsWarper(MIN_P)(None, TemperatureLogitsWarper(T)(None, logits))
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def plain_sampler(logits: torch.Tensor) -> torch.Tensor:
    """The shortest torch: softmax, threshold, multinomial (which takes unnormalised weights)."""
    p = (logits / T).softmax(-1)
    return torch.multinomial(p.masked_fill(p < MIN_P * p.amax(-1, keepdim=True), 0.0), 1)[:, 0]


def flashinfer_samplers(z: torch.Tensor) -> dict[str, Callable]:
    """Its softmax and its Min-P, where it is installed."""
    try:
        from flashinfer import sampling
    except ImportError:
        return {}
    return {"FlashInfer": lambda: sampling.min_p_sampling_from_probs(sampling.softmax(z, T), MIN_P)}


def replayed(call: Callable) -> Callable:
    """Replays a CUDA graph of the call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(call: Callable) -> int:
    """What a call starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


@functools.cache
def compiled_sampler() -> Callable:
    return torch.compile(plain_sampler)


def variants_of(z: torch.Tensor) -> dict[str, Callable]:
    variants = {
        "sample": lambda: sample(z, T, min_p=MIN_P, seed=1),
        "logits.amax(-1)": lambda: z.amax(-1),
        "transformers": lambda: transformers_sampler(z.float()),
        "softmax + multinomial": lambda: plain_sampler(z),
        "softmax + multinomial, torch.compile": lambda: compiled_sampler()(z),
    }
    if device() == "cuda":
        variants |= flashinfer_samplers(z)
        variants |= {
            f"{name}, graph": replayed(variants[name])
            for name in ("sample", "FlashInfer")
            if name in variants
        }
    return variants


def measure(kind: str, B: int, V: int, dtype: torch.dtype, bandwidth: float) -> list[dict]:
    z = (torch.randn(B, V, device=device()) * KINDS[kind]).to(dtype)
    variants = variants_of(z)
    warm, cold = interleave(variants, burst=6), interleave(variants)
    limit = z.numel() * z.element_size() / bandwidth
    rows = [
        {
            "logits": kind,
            "V": V,
            "B": B,
            "sampler": name,
            "us": 1e6 * t["seconds"],
            "p20": 1e6 * t["p20"],
            "p80": 1e6 * t["p80"],
            "over_sample": t["seconds"] / warm["sample"]["seconds"],
            "share_of_one_read": limit / t["seconds"],
            "cold_us": 1e6 * cold[name]["seconds"],
            "cold_over_sample": cold[name]["seconds"] / cold["sample"]["seconds"],
        }
        for name, t in warm.items()
    ]
    if device() == "cuda":
        rows = [{**row, "launches": launches(variants[row["sampler"]])} for row in rows]
    return rows


def main() -> None:
    torch.manual_seed(0)
    on_gpu = device() == "cuda"
    dtype, batches = (
        (torch.bfloat16, (1, 8, 64, 128, 512)) if on_gpu else (torch.float32, (1, 8, 64))
    )
    bandwidth = read_bandwidth()
    shapes = [(kind, B, V) for kind in KINDS for B in batches]
    shapes += [("peaked", B, other) for other in OTHER_V for B in batches]
    rows = [
        row for kind, B, columns in shapes for row in measure(kind, B, columns, dtype, bandwidth)
    ]
    facts = {"dtype": str(dtype).removeprefix("torch."), "temperature": T, "min_p": MIN_P}
    record("sampling", rows, **facts, read_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
