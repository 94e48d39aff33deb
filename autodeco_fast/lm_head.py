"""The LM head's product and transform in torch: z = softcap·tanh(scale·(h Wᵀ + b) / softcap)."""

import torch

from autodeco_fast.numerics import compute_dtype

PRODUCT_ROWS = 128  # of a tile of the vendor's product


def rows_of_chunk(chunk_bytes: int, weight: torch.Tensor, most: int) -> int:
    """Rows of logits that take `chunk_bytes`, one at least and `most` at most: whole tiles of the
    product, if that is not nothing."""
    rows = max(1, chunk_bytes // (len(weight) * weight.element_size()))
    if rows > PRODUCT_ROWS:
        rows -= rows % PRODUCT_ROWS
    return min(rows, max(1, most))


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
