"""The Min-P hinge in torch: results as of `kernels/min_p_hinge.py`; also takes fp64.

On CPUs `hinge_loops.py` goes through the rows once.
"""

import numpy as np
import torch

from .hinge_loops import ROWS, hinge
from .jit import in_threads
from .running_sums import is_compiled

_WORTH_A_THREAD = 32  # blocks of rows for each thread that is woken


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
    run = _compiled if is_compiled(temperature) else _in_torch
    return run(temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip)


def _compiled(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    *numbers: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    loss, slope = torch.empty_like(temperature), torch.empty_like(temperature)
    weight = temperature[:0] if weight is None else weight
    arrays = [x.detach().numpy() for x in (temperature, gap, rank, weight, loss, slope)]
    sums = np.empty((2, -(-len(temperature) // ROWS)))
    inv, gravity, power, limit, clip = numbers
    numbers = np.float32(inv), np.float32(gravity), power, np.float32(limit), clip

    def work(blocks: slice) -> None:
        hinge(blocks.start, blocks.stop, *arrays, sums, *numbers)

    in_threads(work, sums.shape[1], sums.shape[1] // _WORTH_A_THREAD)
    total, weight_sum = sums.sum(-1)
    return loss, slope, loss.new_tensor(total), loss.new_tensor(weight_sum)


def _in_torch(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    *numbers: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inv, gravity, power, max_temperature, clip = numbers
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
