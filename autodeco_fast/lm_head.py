"""The LM head's product and transform in torch: z = softcap·tanh(scale·(h Wᵀ + b) / softcap)."""

import torch

from autodeco_fast.numerics import compute_dtype


def multiply(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, buffer: torch.Tensor
) -> torch.Tensor:
    """`hidden @ weight.T + bias`, `[N, V]`, into the front of a flat buffer."""
    out = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def transform_(x: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Logits in fp32 (or fp64): scale, then softcap; in place where x has that type already."""
    z = x.to(compute_dtype(x))
    if scale != 1.0:
        z = z.mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)
