"""`linear_sample` against the LM head's product followed by a sampler: microseconds a call, and
peak memory.

    python -m bench.linear_sample

Random hidden states and weights whose logits have a standard deviation of 3; T = 0.7, Min-P 0.1.
The physical limit is the product alone: at few rows one read of the weight, at many the matrix
unit.
"""

import torch

from autodeco_fast import linear_sample, sample
from bench.harness import device, interleave, peak_bytes, record
from bench.sampling import MIN_P, T, transformers_sampler

CPU_SHAPES = [(B, 896, 151_936) for B in (1, 8, 64, 256)]
GPU_SHAPES = [
    (B, H, V) for H, V in ((4096, 151_936), (3840, 262_208)) for B in (1, 8, 64, 128, 256, 512)
]


def measure(B: int, H: int, V: int, dtype: torch.dtype) -> list[dict]:
    torch.manual_seed(0)
    hidden = torch.randn(B, H, device=device()).to(dtype)
    weight = (torch.randn(V, H, device=device()) * (3 / H**0.5)).to(dtype)
    draw = {"min_p": MIN_P, "seed": 1}
    variants = {
        "linear_sample": lambda: linear_sample(hidden, weight, T, **draw, fused=True),
        "product, sample": lambda: sample(hidden @ weight.T, T, **draw),
        "product, transformers": lambda: transformers_sampler((hidden @ weight.T).float()),
        "product alone": lambda: hidden @ weight.T,
    }
    times = interleave(variants, samples=20, burst=2)
    ours = times["linear_sample"]["seconds"]
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "B": B,
            "H": H,
            "V": V,
            "variant": name,
            "us": 1e6 * t["seconds"],
            "p20": 1e6 * t["p20"],
            "p80": 1e6 * t["p80"],
            "over_linear_sample": t["seconds"] / ours,
            "share_of_product": times["product alone"]["seconds"] / t["seconds"],
            "peak_mb": peak_bytes(variants[name]) / 1e6,
        }
        for name, t in times.items()
    ]


def main() -> None:
    shapes = CPU_SHAPES if device() == "cpu" else GPU_SHAPES
    dtypes = (torch.float32, torch.bfloat16) if device() == "cpu" else (torch.bfloat16,)
    rows = [row for dtype in dtypes for shape in shapes for row in measure(*shape, dtype)]
    record("linear_sample", rows, temperature=T, min_p=MIN_P)


if __name__ == "__main__":
    main()
