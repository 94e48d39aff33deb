"""The hinge without labels in torch: results as of `kernels/nucleus_width.py`; also takes fp64."""

import torch

from autodeco_fast.lm_head import transform_
from autodeco_fast.numerics import compute_dtype

BLOCK = 1 << 18  # logits at a time, one row at least


def nucleus_width(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Same arguments and results as `kernels.nucleus_width.nucleus_width`."""
    N, V = logits.shape
    dtype = compute_dtype(logits)
    out = torch.empty(2, N, dtype=dtype, device=logits.device)
    rows = max(1, BLOCK // V)
    for start in range(0, N, rows):
        here = slice(start, start + rows)
        z = transform_(logits[here].to(dtype, copy=True), scale, softcap)
        out[:, here] = _of_rows(z, temperature[here], inv)
    out[0].add_(temperature, alpha=gravity)
    out[1].add_(gravity)
    return out if weight is None else out.mul_(weight).masked_fill_(weight == 0, 0.0)


def _of_rows(z: torch.Tensor, temperature: torch.Tensor, inv: float) -> torch.Tensor:
    """Σ p relu(T* − T) and −Σ p [T* > T] of rows; z is overwritten."""
    top = z.amax(-1, keepdim=True)
    z.sub_(top.masked_fill_(top == -torch.inf, 0.0))
    p = z.exp()
    share = p.sum(-1).reciprocal_().nan_to_num_(posinf=0.0, nan=torch.nan)
    beyond = z.mul_(-inv).sub_(temperature[:, None]).clamp_(min=0.0)
    p.masked_fill_(beyond == 0, 0.0)
    # At −inf the product would be 0·inf.
    width = torch.linalg.vecdot(p, beyond.clamp_(max=torch.finfo(z.dtype).max))
    return torch.stack([width * share, -p.sum(-1) * share])
