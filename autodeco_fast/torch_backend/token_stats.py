"""Row statistics of the LM head's product in torch: tiles in one reused buffer."""

import torch

from autodeco_fast.lm_head import multiply, transform_
from autodeco_fast.numerics import compute_dtype
from autodeco_fast.stats import IGNORED, RowSums, scatter

from .running_sums import RunningSums, tiling


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    cut: bool = False,
) -> RowSums:
    """Same arguments and results as `kernels.token_stats.token_stats`.

    Ignored rows are not multiplied.
    """
    valid = (column != IGNORED).nonzero()[:, 0]
    V = weight.shape[0]
    tile_rows, columns, block = tiling(len(valid), V)
    tile = hidden.new_empty(min(tile_rows, len(valid)) * columns)
    sums = []
    for rows in valid.split(tile_rows):
        h = hidden[rows]
        blocks = []
        for in_block, h_block in zip(rows.split(block), h.split(block)):
            target = column[in_block]
            if threshold is None:
                against = target_logit(h_block, weight, target, bias, scale, softcap, rounded=True)
            else:
                against = threshold[in_block]
            inverse = None if inverse_temperature is None else inverse_temperature[in_block]
            blocks.append(RunningSums(target, against, inverse, cut))
        for start in range(0, V, columns):
            end = start + columns
            out = multiply(h, weight[start:end], None if bias is None else bias[start:end], tile)
            for running, x in zip(blocks, out.split(block)):
                running.feed(x, start, scale, softcap)
        sums.extend(running.so_far() for running in blocks)
    return scatter(valid, sums, len(column), hidden, inverse_temperature is not None)


def target_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    *,
    rounded: bool = False,
) -> torch.Tensor:
    """The targets' logits `[R]` from a product of their own; −inf where the column is < 0.

    `rounded`: of a product in the dtype of hidden, as chunks hold it.
    """
    dtype, safe_column = compute_dtype(hidden), column.clamp(min=0)
    z = torch.linalg.vecdot(hidden.to(dtype), weight[safe_column].to(dtype))
    z = z if bias is None else z + bias[safe_column].to(dtype)
    z = z.to(hidden.dtype) if rounded else z
    return transform_(z, scale, softcap).masked_fill(column < 0, -float("inf"))
