"""`linear_sample` against the LM head's product followed by a sampler; the limit is the product.

Random hidden states and weights; T = 0.7, Min-P 0.1. Logits have a standard deviation of 3: few
tokens survive; on a GPU also of 2, where many tiles hold a candidate, and from an 8-bit copy of the
weight. At few rows the product is one read of the weight, at many the matrix unit.
"""

import pytest
import torch

from autodeco_fast import QuantizedLMHead, linear_sample, sample
from autodeco_fast.ops.linear_sample import FUSED_ROWS
from bench.machine import device, product_dtypes
from tests.reference.peers import transformers_sample

T, MIN_P = 0.7, 0.1
ON_GPU = device() == "cuda"
SIZES = ((4096, 151_936), (3840, 262_208)) if ON_GPU else ((896, 151_936),)
DEVIATIONS = (3.0, 2.0) if ON_GPU else (3.0,)


def bytes_of_copy(lm_head: QuantizedLMHead, hidden: torch.Tensor) -> int:
    """What a draw reads of an 8-bit copy, and of the weight for the tokens that it cannot rule
    out."""
    copy = (lm_head.codes, lm_head.scale, lm_head.radius, lm_head.length)
    left = lm_head.possible(hidden, T, MIN_P).any(0).sum().item()
    row = lm_head.weight.shape[1] * lm_head.weight.element_size()
    return sum(part.numel() * part.element_size() for part in copy) + left * row


@pytest.mark.parametrize("B", (1, 8, 64, 128, 256, 512) if ON_GPU else (1, 8, 64, 256))
@pytest.mark.parametrize(("H", "V"), SIZES)
@pytest.mark.parametrize("deviation", DEVIATIONS)
@pytest.mark.parametrize("dtype", product_dtypes())
def test_linear_sample(dtype, deviation, H, V, B, take_turns, tiny):
    B, H, V = (min(B, 4), 32, 999) if tiny else (B, H, V)
    torch.manual_seed(0)
    hidden = torch.randn(B, H, device=device()).to(getattr(torch, dtype))
    weight = (torch.randn(V, H, device=device()) * (deviation / H**0.5)).to(hidden.dtype)
    how = {"min_p": MIN_P, "seed": 1}

    def transformers() -> torch.Tensor:
        return transformers_sample((hidden @ weight.T).float(), T, min_p=MIN_P)

    variants, of = {}, {}
    if ON_GPU and B <= FUSED_ROWS:
        lm_head = QuantizedLMHead(weight)
        variants["8-bit copy"] = lambda: linear_sample(hidden, lm_head, T, **how)
        of["8-bit copy"] = {"bytes": bytes_of_copy(lm_head, hidden)}
    take_turns(
        {
            "linear_sample": lambda: linear_sample(hidden, weight, T, **how, fused=True),
            **variants,
            "product, sample": lambda: sample(hidden @ weight.T, T, **how),
            "product, transformers": transformers,
            "product alone": lambda: hidden @ weight.T,
        },
        group=f"linear_sample, B={B}, H={H}, V={V}, {dtype}, deviation {deviation:g}",
        burst=1 if ON_GPU else 2,
        limit="product alone",
        of=of,
        B=B,
        H=H,
        V=V,
        dtype=dtype,
        deviation=deviation,
        bytes=weight.numel() * weight.element_size(),
        flops=2 * B * H * V,
        temperature=T,
        min_p=MIN_P,
    )
