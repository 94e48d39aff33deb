"""Min-P sampling on CPUs: tile maxima in torch, then only the tiles that can hold a survivor, and noise for survivors alone.

After the one read of the logits there is little left to do, so what follows is numpy, whose calls are cheap. Tensors of other
devices are read there; their survivors are drawn on the host.
"""

from collections.abc import Iterator

import numpy as np
import torch

from .philox import at, gumbel

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
    windows = z.unfold(1, width, 1)
    if z.dtype == torch.float32 and z.device.type == "cpu":
        values = windows.numpy()[row, np.minimum(start, last)]
    else:
        values = windows[torch.from_numpy(row), torch.from_numpy(np.minimum(start, last))].float().cpu().numpy()
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


def _places(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`mask.nonzero()` of two dimensions, faster."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def _draw(
    z: torch.Tensor,
    tile_max: np.ndarray,
    top: np.ndarray,
    T: np.ndarray | np.float32,
    tau: np.ndarray,
    noise_of: tuple[np.ndarray | int, ...],
    first: int,
    want: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """token, and what is wanted of logprob, kept, score and logit, of rows without NaN or +inf; T is 0 in greedy rows."""
    B, width = len(tile_max), min(TILE, z.shape[1])
    tau = np.maximum(tau, _LOWEST)
    rows, tiles = _places(tile_max >= tau[:, None])
    out = {"token": np.zeros(B, np.int64)}
    kinds = {"logprob": (0, np.float32), "kept": (0, np.int32), "score": (-np.inf, np.float32), "logit": (-np.inf, np.float32)}
    out |= {name: np.full(B, *kinds[name]) for name in kinds if name in want}
    for part in _whole_rows(rows):
        values = _tiles(z, rows[part], tiles[part], width)
        tile, column = _places(values >= tau[rows[part], None])
        row, ids, logit = rows[part][tile], tiles[part][tile] * width + column + first, values[tile, column]
        edge = np.empty(len(row) + 1, dtype=bool)
        edge[0] = edge[-1] = True
        np.not_equal(row[1:], row[:-1], out=edge[1:-1])  # survivors come row by row, ids ascending
        bounds = edge.nonzero()[0]
        begin, count = bounds[:-1], bounds[1:] - bounds[:-1]
        here = row[begin]
        score = logit + at(T, row) * gumbel(*noise_of, row, ids)
        won = (score == np.maximum.reduceat(score, begin).repeat(count)).nonzero()[0]
        won = won[won.searchsorted(begin)]  # the first of a row: the lowest id
        out["token"][here] = ids[won]
        heat = np.broadcast_to(at(T, here), here.shape)
        sampled = heat > 0
        if "logprob" in want:
            divisor = np.where(sampled, heat, 1)
            distance = (logit - top[here].repeat(count)) / divisor.repeat(count)
            mass = np.add.reduceat(np.exp(distance), begin)
            out["logprob"][here] = np.where(sampled, distance[won] - np.log(mass), 0)
        if "kept" in want:
            out["kept"][here] = np.where(sampled, count, 1)
        if "score" in want:
            out["score"][here], out["logit"][here] = score[won], logit[won]
    return out


def _top_k_top_p(z: torch.Tensor, top: np.ndarray, T: np.ndarray, top_k: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    """The lowest logit that top-k and top-p keep, `[B]`: the same value as `kernels.top_k_top_p`; −inf where all stay.

    Top-p sorts only what can matter: all logits below `max z + T·ln((1 − top_p)/V)` together weigh at most 1 − top_p.
    """
    B, V = z.shape
    floor = np.full(B, -np.inf, np.float32)
    k = np.minimum(top_k, V)
    if (k > 0).any():
        largest = z.float().topk(int(k.max()), -1).values.cpu().numpy()
        floor = np.where(k > 0, largest[np.arange(B), np.maximum(k, 1) - 1], floor)
    for row in ((top_p < 1) & (top > -np.inf)).nonzero()[0]:
        heat, p = max(float(T[row]), float(GREEDY_BELOW)), float(top_p[row])
        weight = lambda x, m=top[row], heat=heat: np.exp((x.astype(np.float64) - m) / heat)  # noqa: E731
        values = z[row].float().cpu().numpy()
        values = values[values >= max(floor[row], _LOWEST)]
        likely = np.sort(values[values >= top[row] + heat * np.log((1 - p) / V)])[::-1]
        above = np.cumsum(weight(likely)) - weight(likely)  # Σ over what is larger, and over ties that stand before
        floor[row] = likely[max(1, above.searchsorted(p * weight(values).sum())) - 1]
    return floor


def _host(value: torch.Tensor | float, kind: type = int) -> np.ndarray | float:
    """A `[B]` tensor as an array; a number as one of this kind."""
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else kind(value)


def _allow(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """−inf where the bit of an id is 0."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    bits = allowed[:, ids // 32] >> (ids % 32).int()
    return logits.masked_fill((bits & 1) == 0, -float("inf"))


def min_p_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor | float,
    min_p: torch.Tensor | float,
    seed: torch.Tensor | int,
    position: torch.Tensor | int,
    stream: torch.Tensor | int | None,
    *,
    top_k: torch.Tensor | int = 0,
    top_p: torch.Tensor | float = 1.0,
    allowed: torch.Tensor | None = None,
    first: int = 0,
    known: torch.Tensor | None = None,
    want: tuple[str, ...] = (),
) -> dict[str, torch.Tensor]:
    """Same arguments, results and tokens as `kernels.min_p_sample.min_p_sample`."""
    B, width = len(logits), min(TILE, logits.shape[1])
    if allowed is not None:
        logits = _allow(logits, allowed)
    host = lambda t: t.cpu().numpy()  # noqa: E731
    status = np.zeros(B, np.int32)
    tile_max = host(_tile_maxima(logits, width).float())
    top = tile_max.max(1)
    well = top < np.inf  # a maximum hands NaN on, so other rows cost no second look
    if not well.all():
        odd = torch.from_numpy(~well).to(logits.device)
        z = logits[odd]
        status[~well] = host(z.isnan().any(-1).int() + 2 * z.isposinf().any(-1).int())
        logits = logits.clone()
        logits[odd] = z.masked_fill(~(z < float("inf")), -float("inf"))
        tile_max = host(_tile_maxima(logits, width).float())
        top = tile_max.max(1)
    status[top == -np.inf] += 4
    if known is not None:
        top = np.maximum(top, host(known))
    T = _host(temperature, np.float32)
    T = T * (T >= GREEDY_BELOW)
    stream = np.arange(B) if stream is None else _host(stream)
    with np.errstate(divide="ignore", invalid="ignore"):
        cut = np.where(T > 0, T * np.log(_host(min_p, np.float32)), np.float32(0))
        tau = top + cut
        if isinstance(top_k, torch.Tensor) or isinstance(top_p, torch.Tensor) or top_k > 0 or top_p < 1:
            rows = (np.broadcast_to(x, B) for x in (T, _host(top_k), _host(top_p, np.float32)))
            tau = np.maximum(tau, _top_k_top_p(logits, top, *rows))
        noise_of = _host(seed), _host(position), stream
        partial = ("score", "logit") if "partial" in want else ()
        out = _draw(logits, tile_max, top, T, tau, noise_of, first, (*want, *partial))
    out["status"] = status
    if partial:
        out["partial"] = np.stack([top, out.pop("score"), out.pop("logit")])
    out = {name: torch.from_numpy(value).to(logits.device) for name, value in out.items()}
    if "full_logprob" in want:
        out["full_logprob"] = _full_logprob(logits, T, out["token"] - first)
    return out


def _full_logprob(logits: torch.Tensor, T: np.ndarray | np.float32, token: torch.Tensor) -> torch.Tensor:
    """ln softmax(z/T)_token; 0 in greedy rows and where nothing is finite."""
    T = torch.from_numpy(np.array(np.broadcast_to(T, len(logits)))).to(logits.device)
    z = logits.float() / torch.where(T > 0, T, 1.0)[:, None]
    log_p = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)
    return torch.where((T > 0) & log_p.isfinite(), log_p, 0.0)
