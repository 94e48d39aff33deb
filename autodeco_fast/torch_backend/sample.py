"""Min-P sampling on CPUs: maxima of tiles, then only the tiles that can hold a survivor, and noise
for survivors alone.

After the one read of the logits there is little left to do: loops over what is left (`draw.py`),
and numpy around them, whose calls are cheap. Tensors of other devices are read there; their
survivors are drawn on the host.
"""

from typing import NamedTuple

import numpy as np
import torch

from .jit import in_threads
from .sample_loops import GREEDY_BELOW, LOWEST, candidates, cuts, draw, maxima_of

TILE = 256
_CHUNK = 1024  # tiles looked at a time: where they must be copied, a copy stays in the caches
_MOST, _TINY = 2**31 - 1, np.finfo(np.float32).tiny  # the largest top-k, the least top-p
_ALONE = 1 << 18  # logits of a single row up to which one core takes the maxima by itself
_WORTH_A_THREAD = 1 << 19  # tokens to look at for each thread that is woken


class _Rows(NamedTuple):
    """What is asked for each of B rows, and what was found; arrays that threads write to."""

    temperature: np.ndarray  # [B] fp32
    min_p: np.ndarray  # [B] fp32
    noise: np.ndarray  # [3, B] int64: seed, position, stream
    top: np.ndarray  # [B] fp32: largest logit
    T: np.ndarray  # [B] fp32, 0 in greedy rows
    token: np.ndarray  # [B] int64
    best: np.ndarray  # [2, B] fp32: score and logit of the token
    kept: np.ndarray  # [B] int64
    mass: np.ndarray  # [B] fp64: Σ e^{(z − top)/T} of what is kept

    @classmethod
    def of(cls, B: int, temperature, min_p, seed, position, stream) -> "_Rows":
        host = lambda x, kind: (
            x.cpu().numpy() if isinstance(x, torch.Tensor) else np.full(B, x, kind)
        )
        noise = np.empty((3, B), np.int64)
        noise[0], noise[1], noise[2] = (
            x.cpu() if isinstance(x, torch.Tensor) else x for x in (seed, position, stream)
        )
        floats, ints = np.empty((2, B), np.float32), np.zeros((2, B), np.int64)
        best, mass = np.full((2, B), -np.inf, np.float32), np.zeros(B)
        return cls(
            host(temperature, np.float32),
            host(min_p, np.float32),
            noise,
            floats[0],
            floats[1],
            ints[0],
            best,
            ints[1],
            mass,
        )


def _on_host(z: torch.Tensor) -> bool:
    """Whether compiled loops can read it as it is."""
    return z.dtype == torch.float32 and z.device.type == "cpu"


def _tile_maxima(z: torch.Tensor) -> np.ndarray:
    """`[B, tiles]` fp32, NaN where one is; a ragged last tile is shorter."""
    B, V = z.shape
    width = min(TILE, V)
    whole = V // width
    maxima = torch.empty(B, -(-V // width), dtype=z.dtype, device=z.device)
    if B == 1 and V <= _ALONE and _on_host(z):
        out = maxima.numpy()
        if maxima_of(z.view(torch.int32).numpy()[0], width, out[0]):
            out[0, 0] = np.nan
        return out
    torch.amax(z[:, : whole * width].unflatten(1, (-1, width)), -1, out=maxima[:, :whole])
    if whole * width < V:
        torch.amax(z[:, whole * width :], -1, out=maxima[:, whole])
    return maxima.float().cpu().numpy()


def _values(z: torch.Tensor, tile: np.ndarray, tiles: int, width: int) -> np.ndarray:
    """What `draw` reads: z itself, or, of tensors that numpy cannot look at, these tiles alone,
    `[n, width]` fp32."""
    if _on_host(z) or tiles == 1:
        return z.float().cpu().numpy()
    row, start = np.divmod(tile, tiles)
    start *= width
    window = np.minimum(start, z.shape[1] - width)
    values = (
        z.unfold(1, width, 1)[torch.from_numpy(row), torch.from_numpy(window)].float().cpu().numpy()
    )
    for i in (start > window).nonzero()[
        0
    ]:  # a ragged tile is the end of the last window: move it to its place
        over = start[i] - window[i]
        values[i, : width - over] = values[i, over:].copy()
    return values


def _draw(
    z: torch.Tensor, maxima: np.ndarray, tau: np.ndarray, rows: _Rows, first: int, measure: bool
) -> None:
    """Writes token, best, kept and, if asked, mass of rows without NaN or +inf."""
    (B, tiles), (_, V) = maxima.shape, z.shape
    width = min(TILE, V)
    tile = candidates(maxima, tau)

    def work(own: slice) -> None:
        begin, end = tile.searchsorted((own.start * tiles, own.stop * tiles))
        for at in range(begin, end, _CHUNK):
            some = tile[at : min(at + _CHUNK, end)]
            values = _values(z, some, tiles, width)
            found = rows.token, rows.best, rows.kept, rows.mass
            draw(
                values,
                some,
                tiles,
                width,
                V,
                first,
                rows.top,
                tau,
                rows.T,
                rows.noise,
                measure,
                *found,
            )

    in_threads(work, B, len(tile) * width // _WORTH_A_THREAD)


def _top_k_top_p(
    z: torch.Tensor, top: np.ndarray, T: np.ndarray, top_k: np.ndarray, top_p: np.ndarray
) -> np.ndarray:
    """The lowest logit that top-k and top-p keep, `[B]`: the same value as `kernels.top_k_top_p`;
    −inf where all stay.

    Top-p sorts only what can matter: all logits below `max z + T·ln((1 − top_p)/V)` together weigh
    at most 1 − top_p.
    """
    B, V = z.shape
    floor = np.full(B, -np.inf, np.float32)
    k = np.minimum(top_k, V)
    if (k > 0).any():
        largest = z.float().topk(int(k.max()), -1).values.cpu().numpy()
        floor = np.where(k > 0, largest[np.arange(B), np.maximum(k, 1) - 1], floor)
    for row in ((top_p < 1) & (top > -np.inf)).nonzero()[0]:
        heat, p = max(float(T[row]), float(GREEDY_BELOW)), float(top_p[row])
        weight = lambda x, m=top[row], heat=heat: np.exp((x.astype(np.float64) - m) / heat)
        values = z[row].float().cpu().numpy()
        values = values[values >= max(floor[row], LOWEST)]
        likely = np.sort(values[values >= top[row] + heat * np.log((1 - p) / V)])[::-1]
        above = np.cumsum(weight(likely)) - weight(
            likely
        )  # Σ over what is larger, and over ties that stand before
        floor[row] = likely[max(1, above.searchsorted(p * weight(values).sum())) - 1]
    return floor


def _allow(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """−inf where the bit of an id is 0."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    bits = allowed[:, ids // 32] >> (ids % 32).int()
    return logits.masked_fill((bits & 1) == 0, -float("inf"))


def sample(
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
    """Same arguments, results and tokens as `kernels.sample.sample`."""
    B = len(logits)
    if allowed is not None:
        logits = _allow(logits, allowed)
    rows = _Rows.of(
        B, temperature, min_p, seed, position, np.arange(B) if stream is None else stream
    )
    status = np.empty(B, np.int32)
    lower = np.empty(0, np.float32) if known is None else known.cpu().numpy()
    measure, tau = "logprob" in want, np.empty(B, np.float32)
    maxima = _tile_maxima(logits)
    if not cuts(maxima, lower, *rows[:2], rows.top, rows.T, tau, status):
        logits, seen = _without_broken(logits, maxima)
        maxima = _tile_maxima(logits)
        cuts(maxima, lower, *rows[:2], rows.top, rows.T, tau, status)
        status += seen
    if isinstance(top_k, torch.Tensor) or isinstance(top_p, torch.Tensor) or top_k > 0 or top_p < 1:
        k, p = (
            np.broadcast_to(x.cpu().numpy() if isinstance(x, torch.Tensor) else x, B)
            for x in (top_k, top_p)
        )
        wrong = ~((k >= 0) & (k <= _MOST) & (p >= _TINY) & (p <= 1))
        floor = _top_k_top_p(
            logits, rows.top, rows.T, np.where(wrong, 0, k), np.where(wrong, 1.0, p)
        )
        tau = np.where(wrong, np.float32(np.inf), np.maximum(tau, floor))
        rows.T[wrong], status[wrong] = 0, status[wrong] | 8
    _draw(logits, maxima, tau, rows, first, measure)
    status[rows.top == -np.inf] += 4
    out = {"token": rows.token, "status": status}
    if measure:
        out["logprob"] = np.zeros(B, np.float32)
        on = (rows.T > 0) & (rows.kept > 0)
        out["logprob"][on] = (rows.best[1, on] - rows.top[on]) / rows.T[on] - np.log(rows.mass[on])
    if "kept" in want:
        out["kept"] = np.where(rows.T > 0, rows.kept, np.minimum(rows.kept, 1)).astype(np.int32)
    if "partial" in want:
        out["partial"] = np.stack([rows.top, *rows.best])
    out = {name: torch.from_numpy(value).to(logits.device) for name, value in out.items()}
    if "full_logprob" in want:
        out["full_logprob"] = _full_logprob(logits, rows.T, out["token"] - first)
    return out


def _without_broken(logits: torch.Tensor, maxima: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Logits with −inf for NaN and +inf; and what was seen in each row, 1 for NaN and 2 for +inf,
    `[B]` int32."""
    broken = ~(maxima < np.inf).all(1)
    seen = np.zeros(len(logits), np.int32)
    odd = torch.from_numpy(broken).to(logits.device)
    z = logits[odd]
    seen[broken] = (z.isnan().any(-1).int() + 2 * z.isposinf().any(-1).int()).cpu().numpy()
    logits = logits.clone()
    logits[odd] = z.masked_fill(~(z < float("inf")), -float("inf"))
    return logits, seen


def _full_logprob(logits: torch.Tensor, T: np.ndarray, token: torch.Tensor) -> torch.Tensor:
    """ln softmax(z/T)_token; 0 in greedy rows and where nothing is finite."""
    T = torch.from_numpy(T).to(logits.device)
    z = logits.float() / torch.where(T > 0, T, 1.0)[:, None]
    log_p = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)
    return torch.where((T > 0) & log_p.isfinite(), log_p, 0.0)
