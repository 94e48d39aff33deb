"""Min-P sampling on CPUs: tile maxima in torch, then only the tiles that can hold a survivor, and noise for survivors alone.

After the one read of the logits there is little left to do, so what follows is numpy, whose calls are cheap. Tensors of other
devices are read there; their survivors are drawn on the host.
"""

from collections.abc import Iterator

import numpy as np
import torch

from .philox import gumbel

TILE = 128
GREEDY_BELOW = np.float32(1e-3)
_LOWEST = np.finfo(np.float32).min  # `z ≥ max(τ, lowest)` also says that z is not −inf
_CHUNK = 1024  # tiles looked at a time: their tokens, words and noise stay in the caches


def _tile_maxima(z: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, ceil(V / width)]`; a ragged last tile is shorter."""
    V = z.shape[1]
    whole = V // width * width
    parts = [z[:, :whole].unflatten(1, (-1, width)).amax(-1)]
    if whole < V:
        parts.append(z[:, whole:].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _tiles(z: torch.Tensor, row: np.ndarray, tile: np.ndarray, width: int) -> np.ndarray:
    """The logits of these tiles, `[n, width]` fp32; −inf beyond V."""
    last = z.shape[1] - width
    start = tile * width
    values = z.unfold(1, width, 1)[torch.from_numpy(row), torch.from_numpy(np.minimum(start, last))].float().cpu().numpy()
    for i in (start > last).nonzero()[0]:  # the ragged tile was read from `last` on: move it to its place
        over = start[i] - last
        values[i] = np.concatenate([values[i, over:], np.full(over, -np.inf, np.float32)])
    return values


def _whole_rows(row: np.ndarray) -> Iterator[slice]:
    """Cuts a sorted list of rows into parts of about `_CHUNK` that end where a row ends."""
    at = 0
    while at < len(row):
        end = min(at + _CHUNK, len(row))
        if end < len(row):
            begin = int(np.searchsorted(row, row[end]))  # of the row that would be cut in two
            end = begin if begin > at else int(np.searchsorted(row, row[end], "right"))
        yield slice(at, end)
        at = end


def _draw(
    z: torch.Tensor,
    tile_max: np.ndarray,
    top: np.ndarray,
    T: np.ndarray,
    log_min_p: np.ndarray,
    noise_of: tuple[np.ndarray, ...],
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """token, logprob, kept of rows without NaN or +inf; T is 0 in greedy rows."""
    B = len(tile_max)
    cut = np.where(T > 0, T * log_min_p, 0)
    tau = np.maximum(top + cut, _LOWEST)
    rows, tiles = (tile_max >= tau[:, None]).nonzero()
    token, logprob, kept = np.zeros(B, np.int64), np.zeros(B, np.float32), np.zeros(B, np.int32)
    for part in _whole_rows(rows):
        values = _tiles(z, rows[part], tiles[part], width)
        at, column = (values >= tau[rows[part], None]).nonzero()
        row, ids, logit = rows[part][at], tiles[part][at] * width + column, values[at, column]
        edge = np.empty(len(row) + 1, dtype=bool)
        edge[0] = edge[-1] = True
        np.not_equal(row[1:], row[:-1], out=edge[1:-1])  # survivors come row by row, ids ascending
        bounds = edge.nonzero()[0]
        begin, count = bounds[:-1], bounds[1:] - bounds[:-1]
        here = row[begin]
        score = logit + T[row] * gumbel(*(n[row] for n in noise_of), ids)
        won = (score == np.maximum.reduceat(score, begin).repeat(count)).nonzero()[0]
        won = won[won.searchsorted(begin)]  # the first of a row: the lowest id
        token[here] = ids[won]
        sampled = T[here] > 0
        divisor = np.where(sampled, T[here], 1)
        distance = (logit - top[here].repeat(count)) / divisor.repeat(count)
        mass = np.add.reduceat(np.exp(distance), begin)
        logprob[here] = np.where(sampled, distance[won] - np.log(mass), 0)
        kept[here] = np.where(sampled, count, 1)
    return token, logprob, kept


def min_p_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    stream: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments, results and tokens as `kernels.min_p_sample.min_p_sample`."""
    width = min(TILE, logits.shape[1])
    host = lambda t: t.cpu().numpy()  # noqa: E731
    status = np.zeros(len(logits), np.int32)
    tile_max = host(_tile_maxima(logits, width).float())
    top = tile_max.max(1)
    finite = top < np.inf  # a maximum hands NaN on, so other rows cost no second look
    if not finite.all():
        odd = torch.from_numpy(~finite)
        z = logits[odd]
        status[~finite] = host(z.isnan().any(-1).int() + 2 * z.isposinf().any(-1).int())
        logits = logits.clone()
        logits[odd] = z.masked_fill(~(z < float("inf")), -float("inf"))
        tile_max = host(_tile_maxima(logits, width).float())
        top = tile_max.max(1)
    T = host(temperature)
    T = np.where(T < GREEDY_BELOW, np.float32(0), T)
    with np.errstate(divide="ignore", invalid="ignore"):
        noise_of = (host(seed), host(position), host(stream))
        out = _draw(logits, tile_max, top, T, np.log(host(min_p)), noise_of, width)
    status[top == -np.inf] += 4
    return tuple(torch.from_numpy(a).to(logits.device) for a in (*out, status))
