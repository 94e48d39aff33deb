"""What people run instead, written plainly: transformers' samplers, and eager torch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


def transformers_sample(logits: torch.Tensor, temperature: float, **cuts: float) -> torch.Tensor:
    """What `generate(do_sample=True, …)` does a step, from fp32 logits to token."""
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    for name, warper in _WARPERS.items():
        if name in cuts:
            scores = warper(cuts[name])(None, scores)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def eager_sample(logits: torch.Tensor, temperature: float, min_p: float) -> torch.Tensor:
    """The shortest torch: softmax, threshold, multinomial (which takes unnormalised weights)."""
    p = (logits / temperature).softmax(-1)
    return torch.multinomial(p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0), 1)[:, 0]


def eager_stats(z: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The six statistics of `logit_stats`, in fp32: the cast is part of it, so that a compiler may
    read logits as they are."""
    z = z.float()
    top, argmax = z.max(-1)
    at_target = z.gather(1, target[:, None])[:, 0]
    lse = z.logsumexp(-1)
    entropy = lse - ((z - lse[:, None]).exp() * z).sum(-1)
    return top, argmax, at_target, lse, (z > at_target[:, None]).sum(-1), entropy


def eager_head(h: torch.Tensor, mlp: torch.nn.Sequential) -> torch.Tensor:
    """The temperature head."""
    return 2.0 * torch.sigmoid(mlp(h))[:, 0]


def eager_hinge(T: torch.Tensor, gap: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """The Min-P hinge at p_min = 0.1, λ = 0.1, T_max = 2."""
    required = gap / 2.302585
    kept = (rank >= 0) & (required <= 2.0)
    return (((required - T).relu() + 0.1 * T) * kept).sum() / kept.sum().clamp(min=1)


def eager_nucleus_width(T: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The hinge without labels at p_min = 0.1, λ = 0.1, in fp32, the cast in it."""
    z = z.float()
    required = (z.amax(-1, keepdim=True) - z) / 2.302585
    p = z.softmax(-1) * (required <= 2.0)
    T = T[:, None]
    return (p * ((required - T).relu() + 0.1 * T)).sum(-1).mean()


def eager_hinge_step(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, head: torch.nn.Module
) -> None:
    """A head's training step from logits: all six statistics, the loss and its gradient."""
    with torch.no_grad():
        z = (hidden @ weight.T).float()
        top, argmax = z.max(-1)
        at_target = z.gather(1, target[:, None])[:, 0]
        rank = (z > at_target[:, None]).sum(-1)
        log_p = F.log_softmax(z, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        del argmax, entropy, z, log_p
    eager_hinge(head(hidden), top - at_target, rank).backward()


def gradients(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable:
    """Forward and backward of `loss()`."""
    return lambda: torch.autograd.grad(loss(), leaves)
