"""`torch.compile`, and kernels of other libraries where they are installed: names and calls of what
`bench/` times beside this library. What transformers and eager torch do is in
`tests/reference/peers.py`.

Other libraries' are for GPUs. A call that its library's version refuses is noted in the record.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.machine import device

Call = Callable[[], object]


def installed(module: str) -> bool:
    return device() == "cuda" and importlib.util.find_spec(module) is not None


def compiled_by_torch(function: Callable, *, tiny: bool = False) -> Callable:
    """`torch.compile` for the shapes of the next calls alone; tiny ones are traced and not
    compiled.

    What was compiled before is forgotten, or a second shape would be compiled for all shapes, and
    one too many not at all, in silence.
    """
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, **({"backend": "eager"} if tiny else {}))


def samplers(z: torch.Tensor, temperature: float, **cuts: float) -> dict[str, Call]:
    """FlashInfer: its softmax, then its sampler of one cut; of several, renormalised in turn."""
    if not installed("flashinfer"):
        return {}
    from flashinfer import sampling

    last = {
        ("min_p",): sampling.min_p_sampling_from_probs,
        ("top_k",): sampling.top_k_sampling_from_probs,
        ("top_p",): sampling.top_p_sampling_from_probs,
    }

    def several() -> torch.Tensor:
        p = sampling.softmax(z, temperature)
        p = sampling.top_p_renorm_probs(
            sampling.top_k_renorm_probs(p, cuts["top_k"]), cuts["top_p"]
        )
        return sampling.min_p_sampling_from_probs(p, cuts["min_p"])

    def one() -> torch.Tensor:
        return last[tuple(cuts)](sampling.softmax(z, temperature), *cuts.values())

    return {"FlashInfer": several if len(cuts) > 1 else one}


def cross_entropies(z: torch.Tensor, target: torch.Tensor) -> dict[str, Call]:
    """Losses from logits, forward: a part of what `logit_stats` computes."""
    found: dict[str, Call] = {}
    if installed("quack"):
        from quack.cross_entropy import cross_entropy_fwd

        found["quack cross-entropy"] = lambda: cross_entropy_fwd(z, target, return_lse=True)
    if installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        private = z.clone()  # its forward may write gradients over its input
        found["Liger cross-entropy"] = lambda: liger_cross_entropy(private, target)
    return found


def linear_cross_entropies(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> dict[str, Call]:
    """Losses from hidden states, forward: a part of what `token_stats` computes."""
    found: dict[str, Call] = {}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, target)
    if installed("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (
            fused_linear_cross_entropy_forward as liger,
        )

        found["Liger FLCE"] = lambda: liger(hidden, weight, target)
    if installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["Cut Cross-Entropy"] = lambda: cut(hidden, weight, target)
    if installed("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

        found["quack linear cross-entropy"] = lambda: quack(hidden, weight, target)
    return found
