"""AutoDeco's two losses of a forward whose logits are there."""

import torch

from autodeco_fast.losses.autodeco import autodeco_temperature_loss
from autodeco_fast.ops.logit_stats import logit_stats
from autodeco_fast.ops.soft_top_p import soft_top_p_rows
from autodeco_fast.ops.token_stats import CHUNK_BYTES

_STEEPNESS = 30.0  # of the soft top-p mask, as released


def heads_losses(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: torch.Tensor,
    predicted: bool,
    top_p: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """`temp_loss` and `top_p_loss`, means over the rows that each looks at, 0 if there are none.

    Args:
        logits: `[B, L, V]`, without a graph.
        target: `[B, L]` ids, −100 where there is none.
        predicted: whether the temperature is a head's; else it has no loss.
        top_p: `[B, L]`; None for a head that is not used.
    """
    z, y, T = logits.flatten(0, -2), target.flatten(), temperature.flatten()
    losses = {}
    if predicted:
        losses["temp_loss"] = autodeco_temperature_loss(T, logit_stats(z, y, temperature=T))
    if top_p is not None:
        losses["top_p_loss"] = _soft_top_p_loss(z, y, T, top_p.flatten())
    return losses


def _soft_top_p_loss(
    z: torch.Tensor, y: torch.Tensor, T: torch.Tensor, P: torch.Tensor
) -> torch.Tensor:
    """`soft_top_p_loss` of logits `[N, V]`; the rows that have a target are sorted, some at a
    time."""
    rows = (y >= 0).nonzero().squeeze(-1)
    chunk = max(1, CHUNK_BYTES // (z.shape[1] * z.element_size()))
    total = P.new_zeros(())
    for index in rows.split(chunk):
        losses = soft_top_p_rows(
            z[index],
            None,
            y[index],
            T[index],
            P[index],
            bias=None,
            steepness=_STEEPNESS,
            logit_scale=1.0,
            softcap=None,
            chunk_bytes=CHUNK_BYTES,
        )
        total = total + losses.sum()
    return total / max(1, len(rows))
