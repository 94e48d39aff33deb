"""The hinge without labels as one op, from logits or from chunks of the LM head's product; its
slope is made in the forward."""

import torch

from autodeco_fast.backends import implementation
from autodeco_fast.lm_head import multiply, rows_of_chunk
from autodeco_fast.numerics import compute_dtype


@torch.library.custom_op("autodeco_fast::nucleus_width", mutates_args=())
def nucleus_width(
    temperature: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    row_weight: torch.Tensor | None,
    inv: float,
    gravity: float,
    max_temperature: float,
    clip: bool,
    logit_scale: float,
    softcap: float | None,
    chunk_bytes: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's loss, and its derivative by the temperature; differentiable in the temperature by
    the first.

    Args:
        hidden: `[N, H]`, or the logits `[N, V]` themselves where there is no `weight`.
        weight, bias: `[V, H]` and `[V]` of the output embedding, or None.
        row_weight: `[N]`, or None.
        chunk_bytes: of logits that are made at a time.
        inv: `1 / (−ln p_min)`.
    """
    of_logits = implementation(backend, "nucleus_width")
    settings = inv, gravity, max_temperature, clip, logit_scale, softcap
    if weight is None:
        loss, slope = of_logits(hidden, temperature, row_weight, *settings)
        return loss.clone(), slope.clone()
    N, V = hidden.shape[0], weight.shape[0]
    chunk = rows_of_chunk(chunk_bytes, weight, N)
    buffer = hidden.new_empty(chunk * V)
    out = torch.empty(2, N, dtype=compute_dtype(hidden), device=hidden.device)
    for start in range(0, N, chunk):
        here = slice(start, start + chunk)
        logits = multiply(hidden[here], weight, bias, buffer)
        w = None if row_weight is None else row_weight[here]
        out[:, here] = of_logits(logits, temperature[here], w, *settings)
    loss, slope = out
    return loss.clone(), slope.clone()


@nucleus_width.register_fake
def _(
    temperature,
    hidden,
    weight,
    bias,
    row_weight,
    inv,
    gravity,
    max_temperature,
    clip,
    logit_scale,
    softcap,
    chunk_bytes,
    backend,
):
    rows = hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden))
    return rows, torch.empty_like(rows)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, d_loss, _):
    (slope,) = ctx.saved_tensors
    return d_loss * slope, *(None,) * 12


nucleus_width.register_autograd(_autograd, setup_context=_setup)
