"""The Min-P hinge in torch: same arguments and results as `kernels/min_p_hinge.py`; also takes fp64."""

import torch


def _need_and_weight(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    max_temperature: float,
    clip: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T* and the weight, 0 for rows that do not count. Both are new tensors."""
    need = gap * inv
    kept = rank >= 0
    if clip:
        need.clamp_(max=max_temperature)
    else:
        kept &= need <= max_temperature
    w = kept.to(temperature.dtype)
    return need, w if weight is None else w.mul_(weight)


def _counted(values: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`w·values` in place, 0 and not NaN where w is 0 and the value infinite."""
    return values.mul_(w).masked_fill_(w == 0, 0.0)


def hinge_forward(temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip):
    """Per-row loss `[N]`, Σ loss `[]`, Σ weight `[]`."""
    need, w = _need_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    hinge = need.sub_(temperature).relu_()
    loss = _counted((hinge if power == 1 else hinge.square_()).add_(temperature, alpha=gravity), w)
    return loss, loss.sum(), w.sum()


def hinge_backward(grad, temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip):
    """dT `[N]`."""
    need, w = _need_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    slope = need.gt_(temperature) if power == 1 else need.sub_(temperature).relu_().mul_(2)
    return _counted(slope.neg_().add_(gravity).mul_(grad), w)
