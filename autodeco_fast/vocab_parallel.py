"""Merging draws from parts of a vocabulary.

With `τ = max of all maxima + T·ln p_min`: a part's winner with z ≥ τ is its best token of the whole
row's kept set, since the part compared a superset of that. A part whose winner has z < τ and a
score that reaches the best such winner's is *open*: what it kept may hold a better token than its
winner says.
"""

import torch

GREEDY_BELOW = 1e-3


def row_of(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """fp32, of `[B]` or of no dimension; a number is written on the device, not copied there, which
    would wait for it."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def merge(
    maximum: torch.Tensor,
    score: torch.Tensor,
    logit: torch.Tensor,
    token: torch.Tensor,
    temperature: torch.Tensor | float,
    min_p: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Winners of R parts.

    Args:
        maximum, score, logit: `[R, B]` fp32 of each part's largest logit and of its winner, −inf
            without one.
        token: `[R, B]` int64 ids of the winners in the whole vocabulary.
        temperature, min_p: `[B]` fp32 or a number.

    Returns:
        token `[B]` int64 (0 where there is none), its logit `[B]` fp32, open `[R, B]` bool.
    """
    T, min_p = (row_of(value, maximum) for value in (temperature, min_p))
    cut = torch.where(T < GREEDY_BELOW, 0.0, T * min_p.log())
    tau = maximum.amax(0) + cut
    drawn = score > -float("inf")
    valid = drawn & (logit >= tau)
    best = torch.where(valid, score, -float("inf")).amax(0)
    first = torch.where(valid & (score == best), token, torch.iinfo(torch.int64).max).amin(0)
    some = valid.any(0)
    winner = torch.where(some, first, 0)
    chosen = torch.where(valid & (token == winner), logit, -float("inf")).amax(0)
    return winner, chosen, drawn & ~valid & (maximum >= tau) & (score >= best)
