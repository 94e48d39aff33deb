"""AutoDeco's four numbers of a distribution in torch, a few rows at a time; also takes fp64."""

import torch

from autodeco_fast.lm_head import transform_
from autodeco_fast.numerics import compute_dtype

EPSILON = 1e-8
BLOCK = 1 << 18  # elements at a time, one row at least


def prob_stats(
    logits: torch.Tensor, temperature: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Same arguments and results as `kernels.prob_stats.prob_stats`."""
    N, V = logits.shape
    dtype = compute_dtype(logits)
    out = torch.empty(4, N, dtype=dtype, device=logits.device)
    inverse = 1.0 / (temperature.to(dtype) + EPSILON)
    rows = max(1, BLOCK // V)
    for start in range(0, N, rows):
        here = slice(start, start + rows)
        x = transform_(logits[here].to(dtype, copy=True), scale, softcap)
        p = torch.softmax(x.mul_(inverse[here, None]), -1, out=torch.empty_like(x))
        top = p.topk(min(5, V), -1).values
        out[0, here], out[3, here] = top[:, 0], top.sum(-1)
        out[1, here] = -torch.linalg.vecdot(p, torch.add(p, EPSILON, out=x).log_())
        p.sub_(1.0 / V)
        out[2, here] = torch.linalg.vecdot(p, p) / max(V - 1, 1)
    return out
