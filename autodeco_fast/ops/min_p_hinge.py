"""The Min-P hinge as one op: per-row loss, its slope in T, the sums of loss and weight.

The slope is made in the forward."""

import torch
from torch.autograd.function import once_differentiable

from autodeco_fast.backends import implementation
from autodeco_fast.ops.checks import tracing
from autodeco_fast.ops.eager import eager


def _forward(
    temperature: torch.Tensor,
    gap: torch.Tensor,
    rank: torch.Tensor,
    weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    power: int,
    max_temperature: float,
    clip: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiable in T by the first and the third; arguments as in `kernels.min_p_hinge`."""
    run = implementation(backend, "min_p_hinge")
    return run(temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip)


def _setup(ctx, inputs, output):
    _, slope, _, weight_sum = output
    ctx.save_for_backward(slope)
    ctx.mark_non_differentiable(slope, weight_sum)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, d_rows, d_slope, d_total, d_weight_sum):
    (slope,) = ctx.saved_tensors
    if d_rows is None or d_total is None:
        grad = d_total if d_rows is None else d_rows
    else:
        grad = d_rows + d_total  # each row's loss is in the total, too
    return None if grad is None else grad * slope, *(None,) * 9


_eager = eager(_forward, _setup, _backward)
_op = torch.library.custom_op("autodeco_fast::min_p_hinge", _forward, mutates_args=())
_op.register_autograd(_backward, setup_context=_setup)


@_op.register_fake
def _(temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip, backend):
    rows, total = torch.empty_like(temperature), temperature.new_empty(())
    return rows, torch.empty_like(rows), total, torch.empty_like(total)


def min_p_hinge(temperature: torch.Tensor, *arguments) -> tuple[torch.Tensor, ...]:
    """Loss `[N]`, its slope `[N]`, Σ loss `[]` and Σ weight `[]`; arguments as in `_forward`."""
    run = _op if tracing(temperature) else _eager
    return run(temperature, *arguments)
