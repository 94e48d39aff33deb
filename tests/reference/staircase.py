"""What `linear_sample`'s kernels keep of every split of a row and when they multiply one again, in
torch: the rule of `kernels/candidates.py` without the product, fast enough to count repairs at a
real vocabulary. `tests/test_linear_sample.py` compares it with the kernels."""

from typing import NamedTuple

import torch

INF = float("inf")


class Splits(NamedTuple):
    """Of every split, `[B, S]`."""

    maximum: torch.Tensor
    scores: tuple[torch.Tensor, torch.Tensor]  # of winner and runner-up, as the next
    logits: tuple[torch.Tensor, torch.Tensor]


def in_tiles(x: torch.Tensor, block: int, depth: int) -> torch.Tensor:
    """`[B, V]` as `[B, S, depth, block]`, −inf beyond V."""
    short = -x.shape[1] % (block * depth)
    return torch.nn.functional.pad(x, (0, short), value=-INF).unflatten(1, (-1, depth, block))


def _best(s: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top, at = s.max(-1)
    return top, torch.where(top > -INF, z.gather(-1, at[..., None])[..., 0], -INF)


def kept_of_splits(z: torch.Tensor, s: torch.Tensor, c: float | torch.Tensor) -> Splits:
    """What the first kernel leaves, of logits and scores `[B, S, depth, block]`."""
    none = torch.full(z.shape[:2], -INF)
    maximum, s1, z1, s2, z2 = none, none, none, none, none
    for tile in range(z.shape[2]):
        b_z = z[:, :, tile]
        new = torch.maximum(maximum, b_z.amax(-1))
        b_s = torch.where(b_z >= (new + c)[..., None], s[:, :, tile], -INF)
        top, logit = _best(b_s, b_z)
        won = top > s1
        step = won & (z1 > logit)
        s2, z2 = torch.where(step, s1, s2), torch.where(step, z1, z2)
        s1, z1 = torch.where(won, top, s1), torch.where(won, logit, z1)
        s2 = torch.where(maximum > z1, s2, -INF)
        z2 = torch.where(z2 > z1, z2, -INF)
        top, logit = _best(torch.where(b_z > z1[..., None], b_s, -INF), b_z)
        second = top > s2
        s2, z2 = torch.where(second, top, s2), torch.where(second, logit, z2)
        maximum = new
    return Splits(maximum, (s1, s2), (z1, z2))


def repairs(
    z: torch.Tensor, s: torch.Tensor, c: float | torch.Tensor, *, block: int, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many splits of each row the second kernel multiplies again, and the best score it ends
    with, `[B]` both.

    Args:
        z, s: `[B, V]` logits, and scores z + T·g.
        c: T·ln p_min, a number or `[B, 1]`.
        block, depth: tokens of a tile, tiles of a split.
    """
    z, s = in_tiles(z, block, depth), in_tiles(s, block, depth)
    left = kept_of_splits(z, s, c)
    tau = left.maximum.amax(1, keepdim=True) + c
    won = left.logits[0] >= tau
    claim = torch.where(won, *left.scores)
    valid = (torch.where(won, *left.logits) >= tau) & (claim > -INF)
    score = torch.where(valid, claim, -INF).amax(1)
    still = torch.where(~valid & (left.maximum >= tau), claim, -INF)
    truth = torch.where(z >= tau[..., None, None], s, -INF).amax((2, 3))
    claims, order = still.sort(1, descending=True)
    count = torch.zeros(len(z), dtype=torch.int32)
    for k in range(claims.shape[1]):
        again = (claims[:, k] >= score) & (claims[:, k] > -INF)
        if not again.any():
            break
        count += again
        found = truth.gather(1, order[:, k : k + 1])[:, 0]
        score = torch.where(again, torch.maximum(score, found), score)
    return count, score
