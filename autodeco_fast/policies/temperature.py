"""T as logits are divided by it."""

import torch
from torch import nn

from autodeco_fast.numerics import GREEDY_BELOW

# What the logits of greedy rows are divided by: any two different fp32 logits end up whole nats
# apart.
GREEDY_DIVISOR = 1e-20


def predicted(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """T of `hidden [..., H]`, `[...]` fp32, on its device.

    Raises:
        ValueError: if what the head predicts has another shape.
    """
    weight = next(head.parameters(), hidden)
    T = head(hidden.to(device=weight.device, dtype=weight.dtype))
    if T.shape != hidden.shape[:-1]:
        raise ValueError(
            f"a head must predict T of shape {tuple(hidden.shape[:-1])} of hidden states of shape "
            f"{tuple(hidden.shape)}, got {tuple(T.shape)}"
        )
    return T.to(hidden.device)


def divisor(temperature: torch.Tensor) -> torch.Tensor:
    """What to divide the logits of `T [...]` by: `[..., 1]` fp32, positive."""
    return torch.where(temperature < GREEDY_BELOW, GREEDY_DIVISOR, temperature).unsqueeze(-1)
