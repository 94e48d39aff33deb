"""T as logits are divided by it."""

import torch
from torch import nn

from autodeco_fast.numerics import GREEDY_BELOW

# What the logits of greedy rows are divided by: any two different fp32 logits end up whole nats
# apart.
GREEDY_DIVISOR = 1e-20


def predicted(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """T of `hidden [..., H]`, `[...]` fp32, on its device."""
    weight = next(head.parameters())
    return head(hidden.to(device=weight.device, dtype=weight.dtype)).to(hidden.device)


def divisor(temperature: torch.Tensor) -> torch.Tensor:
    """What to divide the logits of `T [...]` by: `[..., 1]` fp32, positive."""
    return torch.where(temperature < GREEDY_BELOW, GREEDY_DIVISOR, temperature).unsqueeze(-1)
