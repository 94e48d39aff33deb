"""AutoDeco's four numbers of a distribution in torch, a few rows at a time; also takes fp64."""

import torch

from .logit_stats import kind_of, transform

EPSILON = 1e-8
BLOCK = 1 << 18  # elements at a time, one row at least


def prob_stats(
    logits: torch.Tensor, temperature: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """Same arguments and results as `kernels.prob_stats.prob_stats`."""
    N, V = logits.shape
    kind = kind_of(logits)
    out = torch.empty(4, N, dtype=kind, device=logits.device)
    inverse = 1.0 / (temperature.to(kind) + EPSILON)
    rows = max(1, BLOCK // V)
    for start in range(0, N, rows):
        here = slice(start, start + rows)
        x = transform(logits[here].to(kind, copy=True), scale, softcap)
        p = torch.softmax(x.mul_(inverse[here, None]), -1, out=torch.empty_like(x))
        top = p.topk(min(5, V), -1).values
        out[0, here], out[3, here] = top[:, 0], top.sum(-1)
        out[1, here] = -torch.linalg.vecdot(p, torch.add(p, EPSILON, out=x).log_())
        p.sub_(1.0 / V)
        out[2, here] = torch.linalg.vecdot(p, p) / max(V - 1, 1)
    return out
