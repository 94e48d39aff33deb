"""The Min-P hinge in torch: results as of `kernels/min_p_hinge.py`."""

import torch


def _required_and_weight(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    max_temperature: float,
    clip: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T* and the weight, 0 for rows that do not count. Both are new tensors."""
    required = gap * inv
    kept = rank >= 0
    if clip:
        required.clamp_(max=max_temperature)
    else:
        kept &= required <= max_temperature
    w = kept.to(temperature.dtype)
    return required, w if weight is None else w.mul_(weight)


def _counted(values: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`w·values` in place, 0 and not NaN where w is 0 and the value infinite."""
    return values.mul_(w).masked_fill_(w == 0, 0.0)


def hinge_forward(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    power: int,
    max_temperature: float,
    clip: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-row loss `[N]`, Σ loss `[]`, Σ weight `[]`."""
    required, w = _required_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    hinge = required.sub_(temperature).relu_()
    hinge = hinge if power == 1 else hinge.square_()
    loss = _counted(hinge.add_(temperature, alpha=gravity), w)
    return loss, loss.sum(), w.sum()


def hinge_backward(
    grad: torch.Tensor,
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    power: int,
    max_temperature: float,
    clip: bool,
) -> torch.Tensor:
    """dT `[N]`."""
    required, w = _required_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    if power == 1:
        slope = required.gt_(temperature)
    else:
        slope = required.sub_(temperature).relu_().mul_(2)
    return _counted(slope.neg_().add_(gravity).mul_(grad), w)
