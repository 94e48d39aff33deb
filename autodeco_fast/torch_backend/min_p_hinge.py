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
    """T* and the weight, 0 for rows that do not count."""
    need = gap * inv
    kept = rank >= 0
    if clip:
        need = need.clamp(max=max_temperature)
    else:
        kept = kept & (need <= max_temperature)
    ones = torch.ones_like(temperature) if weight is None else weight
    return need, torch.where(kept, ones, 0.0)


def hinge_forward(temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip):
    """Per-row loss `[N]`, Σ loss `[]`, Σ weight `[]`."""
    need, w = _need_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    loss = torch.where(w != 0, w * ((need - temperature).clamp(min=0) ** power + gravity * temperature), 0.0)
    return loss, loss.sum(), w.sum()


def hinge_backward(grad, temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip):
    """dT `[N]`."""
    need, w = _need_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    slope = (need > temperature).to(need.dtype) if power == 1 else 2 * (need - temperature).clamp(min=0)
    return torch.where(w != 0, grad * w * (gravity - slope), 0.0)
