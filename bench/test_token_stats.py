"""`token_stats`, six statistics of every row of logits from hidden states; the limit is the LM
head's product.

Linear cross-entropies of torch and of other libraries compute a part of them. On a GPU also the
designs of `token_stats`: chunks, and the variants of the streaming one that this GPU runs.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from autodeco_fast import token_stats
from bench import peers
from bench.machine import device, product_dtypes
from tests.reference.peers import eager_stats

ON_GPU = device() == "cuda"
GPU_SHAPES = [
    (N, H, V)
    for H, V in ((896, 151_936), (4096, 128_256), (4096, 151_936), (3840, 262_208))
    for N in (2048, 8192)
]
SHAPES = GPU_SHAPES if ON_GPU else [(256, 896, 151_936)]


def designs(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> dict[str, Callable[[], object]]:
    if not ON_GPU:
        return {}
    from autodeco_fast.kernels import token_stats as kernel

    found = {"chunks": functools.partial(token_stats, hidden, weight, target, fused=False)}
    for name, variant, needs in (
        ("pointers", kernel.POINTERS, 8),
        ("Hopper", kernel.HOPPER, 9),
        ("Blackwell", kernel.BLACKWELL, 10),
    ):
        if torch.cuda.get_device_capability()[0] >= needs:
            rest = target, None, None, None, 1.0, None
            found[f"streaming, {name}"] = functools.partial(
                kernel.token_stats, hidden, weight, *rest, variant=variant
            )
    return found


def eager_token_stats(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return eager_stats(hidden @ weight.T, target)


@pytest.mark.parametrize("dtype", product_dtypes())
@pytest.mark.parametrize(("N", "H", "V"), SHAPES)
def test_token_stats(N, H, V, dtype, take_turns, compiled, tiny):
    N, H, V = (4, 32, 999) if tiny else (N, H, V)
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=device()).to(getattr(torch, dtype))
    weight = (torch.randn(V, H, device=device()) * (3 / H**0.5)).to(hidden.dtype)
    target = torch.randint(0, V, (N,), device=device())
    compiled_stats = compiled(eager_token_stats)
    take_turns(
        {
            "token_stats": lambda: token_stats(hidden, weight, target),
            "eager torch": lambda: eager_token_stats(hidden, weight, target),
            "eager torch, torch.compile": lambda: compiled_stats(hidden, weight, target),
            "product alone": lambda: hidden @ weight.T,
            **designs(hidden, weight, target),
            **peers.linear_cross_entropies(hidden, weight, target),
        },
        group=f"token_stats, N={N}, H={H}, V={V}, {dtype}",
        burst=1 if ON_GPU else 2,
        limit="product alone",
        N=N,
        H=H,
        V=V,
        dtype=dtype,
        bytes=(hidden.numel() + weight.numel()) * weight.element_size(),
        flops=2 * N * H * V,
    )
