"""The Min-P hinge as one op: per-row loss, its sum and the sum of weights, differentiable in T."""

import torch

from autodeco_fast.backends import implementation


@torch.library.custom_op("autodeco_fast::min_p_hinge", mutates_args=())
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ weight is not differentiable; arguments as in `kernels.min_p_hinge.hinge_forward`."""
    forward = implementation(backend, "hinge_forward", module="min_p_hinge")
    return forward(temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip)


@min_p_hinge.register_fake
def _(temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip, backend):
    return torch.empty_like(temperature), temperature.new_empty(()), temperature.new_empty(())


@torch.library.custom_op("autodeco_fast::min_p_hinge_backward", mutates_args=())
def _backward(
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
    backend: str,
) -> torch.Tensor:
    backward = implementation(backend, "hinge_backward", module="min_p_hinge")
    return backward(
        grad, temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip
    )


@_backward.register_fake
def _(grad, temperature, gap, rank, weight, inv, gravity, power, max_temperature, clip, backend):
    return torch.empty_like(temperature)


def _setup(ctx, inputs, output):
    temperature, gap, rank, weight, *ctx.settings = inputs
    ctx.save_for_backward(temperature, gap, rank, weight)


def _autograd(ctx, d_rows, d_total, d_mass):
    temperature, gap, rank, weight = ctx.saved_tensors
    grad = d_rows + d_total  # each row's loss also enters the total
    return _backward(grad, temperature, gap, rank, weight, *ctx.settings), *(None,) * 9


min_p_hinge.register_autograd(_autograd, setup_context=_setup)
