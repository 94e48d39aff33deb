"""Min-P sampling on CPUs: tile maxima in torch, then only the tiles that can hold a survivor, and noise for survivors alone.

After the one read of the logits there is little left to do: a loop over those tiles (`draw.py`), and numpy around it, whose
calls are cheap. Tensors of other devices are read there; their survivors are drawn on the host.
"""

import numpy as np
import torch

from .compiled import in_threads
from .draw import GREEDY_BELOW, LOWEST, cut, draw

TILE = 256
_CHUNK = 1024  # tiles looked at a time: where they must be copied, a copy stays in the caches
_WORTH_A_THREAD = 1 << 19  # tokens of tiles that must be looked at; waking a thread takes as long as 10⁵ of them


def _tile_maxima(z: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, ceil(V / width)]`; a ragged last tile is shorter."""
    V = z.shape[1]
    whole = V // width * width
    parts = [z[:, :whole].unflatten(1, (-1, width)).amax(-1)]
    if whole < V:
        parts.append(z[:, whole:].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _values(z: torch.Tensor, tile: np.ndarray, tiles: int, width: int) -> np.ndarray:
    """What `draw` reads: z itself, or, of tensors that numpy cannot look at, these tiles alone, `[n, width]` fp32."""
    if (z.dtype == torch.float32 and z.device.type == "cpu") or tiles == 1:
        return z.float().cpu().numpy()
    row, start = np.divmod(tile, tiles)
    start *= width
    window = np.minimum(start, z.shape[1] - width)
    values = z.unfold(1, width, 1)[torch.from_numpy(row), torch.from_numpy(window)].float().cpu().numpy()
    for i in (start > window).nonzero()[0]:  # a ragged tile is the end of the last window: move it to its place
        over = start[i] - window[i]
        values[i, : width - over] = values[i, over:].copy()
    return values


def _draw(
    z: torch.Tensor,
    tile_max: np.ndarray,
    top: np.ndarray,
    tau: np.ndarray,
    T: np.ndarray,
    noise_of: tuple[np.ndarray, ...],
    first: int,
    want: tuple[str, ...],
) -> dict[str, np.ndarray]:
    """token, and what is wanted of logprob, kept, score and logit, of rows without NaN or +inf; T is 0 in greedy rows."""
    (B, tiles), (_, V) = tile_max.shape, z.shape
    width = min(TILE, V)
    tile = np.flatnonzero(tile_max >= np.maximum(tau, LOWEST)[:, None])
    token, kept = np.zeros(B, np.int64), np.zeros(B, np.int32)
    best = np.full((2, B), -np.inf, np.float32)
    mass = np.zeros(B if "logprob" in want else 0)

    def work(rows: slice) -> None:
        begin, end = tile.searchsorted((rows.start * tiles, rows.stop * tiles))
        for at in range(begin, end, _CHUNK):
            own = tile[at : min(at + _CHUNK, end)]
            values = _values(z, own, tiles, width)
            draw(values, own, tiles, width, V, first, top, tau, T, *noise_of, token, best, kept, mass)

    in_threads(work, B, len(tile) * width // _WORTH_A_THREAD)
    out = {"token": token}
    if "logprob" in want:
        out["logprob"] = np.zeros(B, np.float32)
        on = (T > 0) & (kept > 0)
        out["logprob"][on] = (best[1, on] - top[on]) / T[on] - np.log(mass[on])
    if "kept" in want:
        out["kept"] = np.where(T > 0, kept, np.minimum(kept, 1))
    if "score" in want:
        out["score"], out["logit"] = best
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
        values = values[values >= max(floor[row], LOWEST)]
        likely = np.sort(values[values >= top[row] + heat * np.log((1 - p) / V)])[::-1]
        above = np.cumsum(weight(likely)) - weight(likely)  # Σ over what is larger, and over ties that stand before
        floor[row] = likely[max(1, above.searchsorted(p * weight(values).sum())) - 1]
    return floor


def _host(value: torch.Tensor | float, B: int, kind: type = np.int64) -> np.ndarray:
    """A `[B]` tensor, or a number, as an array."""
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.full(B, value, kind)


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
    T, tau = np.empty((2, B), np.float32)
    cut(top, _host(temperature, B, np.float32), _host(min_p, B, np.float32), T, tau)
    if isinstance(top_k, torch.Tensor) or isinstance(top_p, torch.Tensor) or top_k > 0 or top_p < 1:
        tau = np.maximum(tau, _top_k_top_p(logits, top, T, _host(top_k, B), _host(top_p, B, np.float32)))
    noise_of = _host(seed, B), _host(position, B), np.arange(B) if stream is None else _host(stream, B)
    partial = ("score", "logit") if "partial" in want else ()
    out = _draw(logits, tile_max, top, tau, T, noise_of, first, (*want, *partial))
    out["status"] = status
    if partial:
        out["partial"] = np.stack([top, out.pop("score"), out.pop("logit")])
    out = {name: torch.from_numpy(value).to(logits.device) for name, value in out.items()}
    if "full_logprob" in want:
        out["full_logprob"] = _full_logprob(logits, T, out["token"] - first)
    return out


def _full_logprob(logits: torch.Tensor, T: np.ndarray, token: torch.Tensor) -> torch.Tensor:
    """ln softmax(z/T)_token; 0 in greedy rows and where nothing is finite."""
    T = torch.from_numpy(T).to(logits.device)
    z = logits.float() / torch.where(T > 0, T, 1.0)[:, None]
    log_p = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)
    return torch.where((T > 0) & log_p.isfinite(), log_p, 0.0)
