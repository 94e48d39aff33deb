"""The Min-P hinge: results as of `kernels/min_p_hinge.py`. One compiled loop on CPUs; torch
elsewhere and in fp64."""

import numpy as np
import torch

from .jit import compiled

_SUMS = {"reassoc", "contract", "nsz"}  # lets a sum run in several lanes


@compiled(fastmath=_SUMS, inline="always")
def _weight_and_hinge(n, T, gap, rank, weight, inv, highest, clip):
    """w, 0 for a row that does not count, and relu(T* − T), NaN where T* is; `weight` is `[N]`, or
    `[0]` for ones."""
    need = gap[n] * inv
    w = weight[n] if len(weight) else np.float32(1)
    w = w if rank[n] >= 0 and (clip or need <= highest) else np.float32(0)
    need = highest if need > highest else need
    return w, np.float32(0) if need <= T[n] else need - T[n]


@compiled(fastmath=_SUMS)
def _forward(T, gap, rank, weight, inv, gravity, square, highest, clip, loss):
    """Writes the loss of every row; returns its sum and that of the weights."""
    total, mass = 0.0, 0.0
    for n in range(len(T)):
        w, hinge = _weight_and_hinge(n, T, gap, rank, weight, inv, highest, clip)
        value = (hinge * hinge if square else hinge) + gravity * T[n]
        loss[n] = np.float32(0) if w == 0 else w * value
        total += loss[n]
        mass += w
    return total, mass


@compiled(fastmath=_SUMS)
def _backward(grad, T, gap, rank, weight, inv, gravity, square, highest, clip, out):
    """Writes grad · dloss/dT of every row."""
    for n in range(len(T)):
        w, hinge = _weight_and_hinge(n, T, gap, rank, weight, inv, highest, clip)
        slope = 2 * hinge if square else np.float32(hinge > 0)
        out[n] = np.float32(0) if w == 0 else w * (gravity - slope) * grad[n]


def _compiled_arguments(
    temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip
) -> tuple | None:
    """What the loops take; None where they do not take these tensors."""
    floats = [temperature, gap, temperature[:0] if weight is None else weight]
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in floats):
        return None
    T, z, w = (x.contiguous().numpy() for x in floats)
    numbers = np.float32(inv), np.float32(gravity), power == 2, np.float32(max_temperature), clip
    return T, z, rank.contiguous().numpy(), w, *numbers


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
    loop = _compiled_arguments(
        temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip
    )
    if loop:
        loss = torch.empty_like(temperature, memory_format=torch.contiguous_format)
        total, mass = _forward(*loop, loss.numpy())
        return loss, loss.new_tensor(total), loss.new_tensor(mass)
    need, w = _need_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    hinge = need.sub_(temperature).relu_()
    loss = _counted((hinge if power == 1 else hinge.square_()).add_(temperature, alpha=gravity), w)
    return loss, loss.sum(), w.sum()


def hinge_backward(
    grad, temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip
):
    """dT `[N]`."""
    loop = _compiled_arguments(
        temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip
    )
    if loop:
        out = torch.empty_like(temperature, memory_format=torch.contiguous_format)
        _backward(grad.contiguous().numpy(), *loop, out.numpy())
        return out
    need, w = _need_and_weight(temperature, gap, rank, weight, inv, max_temperature, clip)
    slope = need.gt_(temperature) if power == 1 else need.sub_(temperature).relu_().mul_(2)
    return _counted(slope.neg_().add_(gravity).mul_(grad), w)
