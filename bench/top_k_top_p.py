"""`sample` with top-k and top-p before Min-P, against transformers' warpers in the same order:
microseconds a call.

    python -m bench.top_k_top_p

Peaked fp32 logits (standard deviation 3), T = 0.7; vocabularies of several models. Calls of the two
take turns.
"""

import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autodeco_fast import sample
from bench.harness import device, interleave, record

T, MIN_P, TOP_K, TOP_P = 0.7, 0.05, 50, 0.95
VOCABULARIES = (128_256, 151_936, 201_088, 262_208)
CUTS = {
    "min_p": {"min_p": MIN_P},
    "top_k": {"top_k": TOP_K},
    "top_p": {"top_p": TOP_P},
    "top_k, top_p, min_p": {"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P},
}
WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


def transformers_sampler(logits: torch.Tensor, cut: dict) -> torch.Tensor:
    scores = TemperatureLogitsWarper(T)(None, logits)
    for name, warper in WARPERS.items():
        if name in cut:
            scores = warper(cut[name])(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for V in VOCABULARIES:
        for B in (1, 8) if device() == "cpu" else (1, 8, 64, 512):
            z = torch.randn(B, V, device=device()) * 3.0
            for name, cut in CUTS.items():
                variants = {
                    "sample": lambda z=z, cut=cut: sample(z, T, **cut, seed=1),
                    "transformers": lambda z=z, cut=cut: transformers_sampler(z, cut),
                }
                times = interleave(variants, samples=20)
                ours, theirs = times["sample"], times["transformers"]
                rows.append(
                    {
                        "V": V,
                        "B": B,
                        "cuts": name,
                        "us": 1e6 * ours["seconds"],
                        "p20": 1e6 * ours["p20"],
                        "p80": 1e6 * ours["p80"],
                        "transformers_us": 1e6 * theirs["seconds"],
                        "over_sample": theirs["seconds"] / ours["seconds"],
                    }
                )
    record(
        "top_k_top_p", rows, dtype="float32", temperature=T, min_p=MIN_P, top_k=TOP_K, top_p=TOP_P
    )


if __name__ == "__main__":
    main()
