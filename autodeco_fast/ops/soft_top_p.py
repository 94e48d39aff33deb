"""AutoDeco's soft top-p loss a row, differentiable in T and P: the derivatives are made together
with the loss."""

import torch

from autodeco_fast.backends import implementation, refuse_transforms
from autodeco_fast.numerics import compute_dtype
from autodeco_fast.ops.checks import row_parameter


@torch.library.custom_op("autodeco_fast::soft_top_p", mutates_args=())
def _soft_top_p(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    column: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    bias: torch.Tensor | None,
    steepness: float,
    logit_scale: float,
    softcap: float | None,
    chunk_bytes: int,
) -> torch.Tensor:
    """`[3, N]`: loss, ∂/∂T, ∂/∂P. `hidden` are logits if there is no weight."""
    if weight is None:
        return implementation("torch", "logits_soft_top_p", module="soft_top_p")(
            hidden, column, temperature, top_p, steepness, logit_scale, softcap
        )
    return implementation("torch", "soft_top_p")(
        hidden,
        weight,
        column,
        temperature,
        top_p,
        bias,
        steepness,
        logit_scale,
        softcap,
        chunk_bytes,
    )


@_soft_top_p.register_fake
def _(
    hidden, weight, column, temperature, top_p, bias, steepness, logit_scale, softcap, chunk_bytes
):
    return hidden.new_empty(3, hidden.shape[0], dtype=compute_dtype(hidden))


class _Rows(torch.autograd.Function):
    """Gives the loss its derivatives."""

    @staticmethod
    def forward(ctx, temperature, top_p, rows):
        ctx.save_for_backward(rows[1], rows[2])
        ctx.dtypes = temperature.dtype, top_p.dtype
        return rows[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        by_temperature, by_top_p = ctx.saved_tensors
        return (grad * by_temperature).to(ctx.dtypes[0]), (grad * by_top_p).to(ctx.dtypes[1]), None


def soft_top_p_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    column: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    steepness: float,
    logit_scale: float,
    softcap: float | None,
    chunk_bytes: int,
) -> torch.Tensor:
    """`[N]` losses, 0 where the column is −2. Without a weight, `hidden` are raw logits
    `[N, V]`."""
    refuse_transforms()
    with torch.no_grad():
        T, P = (row_parameter(x, hidden) for x in (temperature, top_p))
        rows = _soft_top_p(
            hidden.detach(),
            weight,
            column,
            T,
            P,
            bias,
            float(steepness),
            float(logit_scale),
            softcap,
            chunk_bytes,
        )
    return _Rows.apply(temperature, top_p, rows)
