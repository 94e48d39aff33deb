"""The maximum of every sub-tile of a row, the one read of its logits."""

import torch

from autodeco_fast.sampling import SUBTILE

from .top_k_top_p import allow


def maxima_of_subtiles(z: torch.Tensor) -> torch.Tensor:
    """`[B, ⌈V/256⌉]` in the dtype of z; NaN where one is."""
    B, V = z.shape
    whole = V // SUBTILE
    maxima = z.new_empty(B, -(-V // SUBTILE))
    if whole:
        full = z[:, : whole * SUBTILE].unflatten(1, (-1, SUBTILE))
        torch.amax(full, -1, out=maxima[:, :whole])
    if whole * SUBTILE < V:
        torch.amax(z[:, whole * SUBTILE :], -1, out=maxima[:, whole])
    return maxima


def subtile_maxima(logits: torch.Tensor, *, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """Same arguments and results as `kernels.subtile_maxima.subtile_maxima`."""
    if allowed is not None:
        logits = allow(logits, allowed)
    maxima = maxima_of_subtiles(logits).float()
    return maxima.masked_fill_(maxima.isnan(), float("inf"))
