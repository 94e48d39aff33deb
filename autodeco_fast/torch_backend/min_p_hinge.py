"""The Min-P hinge in torch: results as of `kernels/min_p_hinge.py`."""

import torch


def min_p_hinge(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    power: int,
    max_temperature: float,
    clip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss `[N]`, its slope `[N]`, Σ loss `[]`, Σ weight `[]`."""
    required = gap * inv
    out = rank < 0
    if clip:
        required.clamp_(max=max_temperature)
    else:
        out |= required > max_temperature
    w = torch.ones_like(temperature) if weight is None else weight.clone()
    w.masked_fill_(out, 0.0)
    hinge = required.sub_(temperature).relu_()
    if power == 1:
        slope, loss = hinge.sign().neg_(), hinge
    else:
        slope, loss = hinge.mul(-2), hinge.square_()
    loss = loss.add_(temperature, alpha=gravity).mul_(w)
    slope = slope.add_(gravity).mul_(w)
    ignored = w == 0  # 0 and not NaN where the loss is infinite
    loss, slope = loss.masked_fill_(ignored, 0.0), slope.masked_fill_(ignored, 0.0)
    return loss, slope, loss.sum(), w.sum()
