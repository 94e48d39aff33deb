"""`sample` against the samplers people use: microseconds a call and bytes against one read of the logits.

    python -m bench.sampling

V = 151,936 fp32 logits, T = 0.7, Min-P 0.1. "peaked" logits have a standard deviation of 3, a few tokens survive the cut;
"flat" ones 0.1, all survive. A warm call follows two of the same sampler, a cold one a call of another sampler. The physical
limit is one read of the logits at the bandwidth of a plain maximum over 1 GiB; `logits.amax(-1)` is one read by torch.
"""

import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper

from autodeco_fast import sample
from bench.harness import device, interleave, read_bandwidth, record

V, T, MIN_P = 151_936, 0.7, 0.1
KINDS = {"peaked": 3.0, "flat": 0.1}


def transformers_sampler(logits: torch.Tensor) -> torch.Tensor:
    """What `generate(do_sample=True, temperature=0.7, min_p=0.1)` does a step, from fp32 logits to token."""
    scores = MinPLogitsWarper(MIN_P)(None, TemperatureLogitsWarper(T)(None, logits))
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def plain_sampler(logits: torch.Tensor) -> torch.Tensor:
    """The shortest torch: softmax, threshold, multinomial (which takes unnormalised weights)."""
    p = (logits / T).softmax(-1)
    return torch.multinomial(p.masked_fill(p < MIN_P * p.amax(-1, keepdim=True), 0.0), 1)[:, 0]


def main() -> None:
    torch.manual_seed(0)
    batches = (1, 8, 64) if device() == "cpu" else (1, 8, 64, 512)
    bandwidth = read_bandwidth()
    compiled = torch.compile(plain_sampler)
    rows = []
    for kind, deviation in KINDS.items():
        for B in batches:
            z = torch.randn(B, V, device=device()) * deviation
            variants = {
                "sample": lambda z=z: sample(z, T, min_p=MIN_P, seed=1),
                "logits.amax(-1)": lambda z=z: z.amax(-1),
                "transformers": lambda z=z: transformers_sampler(z),
                "softmax + multinomial": lambda z=z: plain_sampler(z),
                "softmax + multinomial, torch.compile": lambda z=z: compiled(z),
            }
            warm, cold = interleave(variants, burst=3), interleave(variants)
            limit = z.numel() * z.element_size() / bandwidth
            for name, t in warm.items():
                rows.append(
                    {
                        "logits": kind,
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
                )
    record("sampling", rows, V=V, dtype="float32", temperature=T, min_p=MIN_P, read_bytes_per_second=bandwidth)


if __name__ == "__main__":
    main()
