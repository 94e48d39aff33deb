"""Row statistics of logits in torch."""

import torch

from autodeco_fast.lm_head import transform_
from autodeco_fast.stats import IGNORED, RowSums, scatter

from .running_sums import BLOCK, RunningSums, is_compiled, tiling


def logit_stats(
    logits: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    cut: bool = False,
) -> RowSums:
    """Same arguments and results as `kernels.logit_stats.logit_stats`."""
    valid = (column != IGNORED).nonzero()[:, 0]
    V, compiled = logits.shape[1], is_compiled(logits)
    columns = V if compiled else tiling(len(valid), V)[1]
    block = max(1, BLOCK // columns)
    untransformed = scale == 1.0 and softcap is None
    # Only then are the logits read where they are, and not copied.
    in_place = compiled and len(valid) == len(logits) and untransformed and logits.is_contiguous()
    sums = []
    for i, rows in enumerate(valid.split(block)):
        target = column[rows]
        if threshold is None:
            against = transform_(logits[rows, target.clamp(min=0)], scale, softcap)
            against.masked_fill_(target < 0, -float("inf"))
        else:
            against = threshold[rows]
        inverse = None if inverse_temperature is None else inverse_temperature[rows]
        running = RunningSums(target, against, inverse, cut)
        for start in range(0, V, columns):
            if in_place:
                x = logits[i * block : (i + 1) * block]
            else:
                x = logits[rows, start : start + columns]
            running.feed(x, start, scale, softcap)
        sums.append(running.so_far())
    return scatter(valid, sums, len(column), logits, inverse_temperature is not None)
