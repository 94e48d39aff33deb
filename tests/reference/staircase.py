"""What `linear_sample`'s kernels keep of every tile of a row and when they multiply one again, in
torch: the rule of `kernels/candidates.py` without the product, fast enough to count repairs at a
real vocabulary. `tests/test_linear_sample_repairs.py` compares it with the kernels."""

from typing import NamedTuple

import torch

INF = float("inf")


class Kept(NamedTuple):
    """Of every tile, `[B, n]`; scores and logits of winner and runner-up, −inf without one."""

    maximum: torch.Tensor
    scores: tuple[torch.Tensor, torch.Tensor]
    logits: tuple[torch.Tensor, torch.Tensor]


def in_tiles(x: torch.Tensor, block: int) -> torch.Tensor:
    """`[B, V]` as `[B, n, block]`, −inf beyond V."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % block), value=-INF).unflatten(
        1, (-1, block)
    )


def _best(s: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    top, at = s.max(-1)
    return top, torch.where(top > -INF, z.gather(-1, at[..., None])[..., 0], -INF)


def kept_of_tiles(z: torch.Tensor, s: torch.Tensor, c: float, depth: int) -> Kept:
    """What the first kernel leaves, of logits and scores `[B, n, block]`; `depth` tiles a split."""
    maximum = z.amax(-1)
    runs = torch.nn.functional.pad(maximum, (0, -z.shape[1] % depth), value=-INF)
    running = runs.unflatten(1, (-1, depth)).cummax(-1).values.flatten(1)[:, : z.shape[1]]
    s = torch.where(z >= (running + c)[..., None], s, -INF)
    s1, z1 = _best(s, z)
    s2, z2 = _best(torch.where(z > z1[..., None], s, -INF), z)
    return Kept(maximum, (s1, s2), (z1, z2))


def repairs(
    z: torch.Tensor,
    g: torch.Tensor,
    T: float,
    c: float,
    *,
    block: int,
    depth: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tiles of each row the second kernel multiplies again, and the best score it ends
    with, `[B]` both.

    Args:
        z, g: `[B, V]` logits and noise.
        T, c: temperature, and T·ln p_min.
        block, depth: tokens of a tile, tiles of a split.
    """
    s, z = in_tiles(z + T * g, block), in_tiles(z, block)
    left = kept_of_tiles(z, s, c, depth)
    tau = left.maximum.amax(1, keepdim=True) + c
    won = left.logits[0] >= tau
    claim = torch.where(won, *left.scores)
    valid = (torch.where(won, *left.logits) >= tau) & (claim > -INF)
    score = torch.where(valid, claim, -INF).amax(1)
    still = torch.where(~valid & (left.maximum >= tau), claim, -INF)
    truth = torch.where(z >= tau[..., None], s, -INF).amax(2)
    claims, order = still.sort(1, descending=True)
    count = torch.zeros(len(z), dtype=torch.int32)
    for k in range(claims.shape[1]):
        again = (claims[:, k] >= score) & (claims[:, k] > -INF)
        if not again.any():
            break
        tile = order[:, k : k + 1]
        count += again
        found = truth.gather(1, tile)[:, 0]
        score = torch.where(again, torch.maximum(score, found), score)
    return count, score
