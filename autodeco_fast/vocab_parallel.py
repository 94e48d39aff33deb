"""A vocabulary split over ranks, or over chunks of one rank: how their results become one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from autodeco_fast.numerics import GREEDY_BELOW
from autodeco_fast.stats import RowSums, moved


def merge_row_sums(ranks: Sequence[RowSums], inverse_temperature: torch.Tensor | None) -> RowSums:
    """Row sums of the whole vocabulary; `inverse_temperature` `[N]` or None."""
    if len(ranks) == 1:
        return ranks[0]
    floats, ints = (torch.stack(tensors) for tensors in zip(*ranks))
    maxima = floats[:, 0]
    top = maxima.amax(0)
    # A rank of −inf alone has no sums to move.
    d = torch.where(maxima == top, 0.0, maxima - top).clamp(min=-1e30)
    rows = [top, floats[:, 1].amax(0), *(x.sum(0) for x in moved(d, floats[:, 2], floats[:, 3]))]
    if inverse_temperature is not None:
        dx = (d * inverse_temperature).clamp(min=-1e9)  # its square is finite
        rows += [x.sum(0) for x in moved(dx, floats[:, 4], floats[:, 5], floats[:, 6])]
    largest = torch.iinfo(torch.int64).max
    argmax = torch.where(maxima == top, ints[:, 0], largest).amin(0)
    return torch.stack(rows), torch.stack([argmax, ints[:, 1].sum(0)])


class SamplePartial(NamedTuple):
    """A rank's candidate for each row, `[B]`, 20 bytes a row to send; or of R ranks, `[R, B]`."""

    maximum: torch.Tensor  # fp32: the rank's largest logit, or what it was told
    score: torch.Tensor  # fp32: of its candidate, z + T·g; −inf without one
    logit: torch.Tensor  # fp32: of its candidate
    token: torch.Tensor  # int64: its candidate's id in the whole vocabulary


def row_of(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """fp32, of `[B]` or of no dimension.

    A number is written on the device, not copied there, which would wait for it.
    """
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def merge_candidates(
    ranks: SamplePartial, temperature: torch.Tensor | float, min_p: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The winners of R ranks.

    With `τ = max of all maxima + T·ln p_min`: a rank's candidate with z ≥ τ is its best token of
    the whole row's kept set, since the rank compared a superset of that. A rank whose candidate has
    z < τ and a score that reaches the best such candidate's is *open*: below it may lie a better
    token of the kept set than its candidate says.

    Args:
        ranks: stacked, R first.
        temperature, min_p: `[B]` fp32 or a number.

    Returns:
        token `[B]` int64 (0 where there is none), its logit `[B]` fp32, open `[R, B]` bool.
    """
    maximum, score, logit, token = ranks
    T, min_p = (row_of(value, maximum) for value in (temperature, min_p))
    cut = torch.where(T < GREEDY_BELOW, 0.0, T * min_p.log())
    tau = maximum.amax(0) + cut
    found = score > -float("inf")
    valid = found & (logit >= tau)
    best = torch.where(valid, score, -float("inf")).amax(0)
    lowest = torch.where(valid & (score == best), token, torch.iinfo(torch.int64).max).amin(0)
    winner = torch.where(valid.any(0), lowest, 0)
    winners_logit = torch.where(valid & (token == winner), logit, -float("inf")).amax(0)
    return winner, winners_logit, found & ~valid & (maximum >= tau) & (score >= best)
