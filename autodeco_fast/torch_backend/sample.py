"""Min-P sampling on CPUs: maxima of tiles, then only the tiles that can hold a survivor, and noise
for survivors alone.

After the one read of the logits there is little left to do: loops over what is left
(`sample_loops.py`), and numpy around them, whose calls are cheap. Tensors of other devices are read
there; their survivors are drawn on the host.
"""

from typing import NamedTuple

import numpy as np
import torch

from autodeco_fast.sampling import (
    CANDIDATE,
    FULL_LOGPROB,
    KEPT,
    LOGPROB,
    SUBTILE,
    Sampled,
    SamplingParameters,
)

from .jit import in_threads
from .sample_loops import best_tokens, candidate_tiles, cuts, maxima_of
from .subtile_maxima import maxima_of_subtiles
from .top_k_top_p import allow, top_k_top_p

_CHUNK = 1024  # tiles looked at a time: where they must be copied, a copy stays in the caches
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
    kept: np.ndarray  # [B] int64: tokens of the kept set
    mass: np.ndarray  # [B] fp64: Σ e^{(z − top)/T} over the kept set


def _floats(value: torch.Tensor | float, B: int) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy()
    return np.full(B, value, np.float32)


def _rows_of(parameters: SamplingParameters, B: int) -> _Rows:
    p, noise = parameters, np.empty((3, B), np.int64)
    stream = np.arange(B) if p.stream is None else p.stream
    for row, value in zip(noise, (p.seed, p.position, stream)):
        row[:] = value.cpu() if isinstance(value, torch.Tensor) else value
    floats, ints = np.empty((2, B), np.float32), np.zeros((2, B), np.int64)
    return _Rows(
        temperature=_floats(p.temperature, B),
        min_p=_floats(p.min_p, B),
        noise=noise,
        top=floats[0],
        T=floats[1],
        token=ints[0],
        best=np.full((2, B), -np.inf, np.float32),
        kept=ints[1],
        mass=np.zeros(B),
    )


def _on_host(z: torch.Tensor) -> bool:
    """Whether compiled loops can read it as it is."""
    return z.dtype == torch.float32 and z.device.type == "cpu"


def _tile_maxima(z: torch.Tensor) -> np.ndarray:
    """`[B, tiles]` fp32, NaN where one is; a ragged last tile is shorter."""
    B, V = z.shape
    if B == 1 and V <= _ALONE and _on_host(z):
        out = np.empty((1, -(-V // SUBTILE)), np.float32)
        if maxima_of(z.view(torch.int32).numpy()[0], SUBTILE, out[0]):
            out[0, 0] = np.nan
        return out
    return maxima_of_subtiles(z).float().cpu().numpy()


def _values(z: torch.Tensor, tile: np.ndarray, tiles: int, width: int) -> np.ndarray:
    """What `best_tokens` reads: z itself, or, of tensors that numpy cannot look at, these tiles
    alone, `[n, width]` fp32."""
    if _on_host(z) or tiles == 1:
        return z.float().cpu().numpy()
    row, start = np.divmod(tile, tiles)
    start *= width
    window = np.minimum(start, z.shape[1] - width)
    index = torch.from_numpy(row), torch.from_numpy(window)
    values = z.unfold(1, width, 1)[index].float().cpu().numpy()
    # A ragged tile is the end of the last window: it is moved to its place.
    for i in (start > window).nonzero()[0]:
        over = start[i] - window[i]
        values[i, : width - over] = values[i, over:].copy()
    return values


def _sample(
    z: torch.Tensor, maxima: np.ndarray, tau: np.ndarray, rows: _Rows, first_id: int, measure: bool
) -> None:
    """Writes token, best, kept and, if asked, mass of rows without NaN or +inf."""
    (B, tiles), (_, V) = maxima.shape, z.shape
    width = min(SUBTILE, V)
    tile = candidate_tiles(maxima, tau)

    def work(some_rows: slice) -> None:
        begin, end = tile.searchsorted((some_rows.start * tiles, some_rows.stop * tiles))
        for at in range(begin, end, _CHUNK):
            some = tile[at : min(at + _CHUNK, end)]
            values = _values(z, some, tiles, width)
            best_tokens(  # compiled: no keyword arguments
                values, some, tiles, width, V, first_id, rows.top, tau, rows.T, rows.noise,
                measure, rows.token, rows.best, rows.kept, rows.mass,
            )  # fmt: skip

    in_threads(work, B, len(tile) * width // _WORTH_A_THREAD)


def sample(
    logits: torch.Tensor,
    parameters: SamplingParameters,
    *,
    allowed: torch.Tensor | None = None,
    first_id: int = 0,
    known_maximum: torch.Tensor | None = None,
    maxima: torch.Tensor | None = None,
    want: int = 0,
) -> Sampled:
    """Same arguments, results and tokens as `kernels.sample.sample`."""
    B = len(logits)
    if allowed is not None:
        logits = allow(logits, allowed)
    rows, tau, status = _rows_of(parameters, B), np.empty(B, np.float32), np.empty(B, np.int32)
    known = np.empty(0, np.float32) if known_maximum is None else known_maximum.cpu().numpy()
    tops = _tile_maxima(logits) if maxima is None else maxima.cpu().numpy()
    if not cuts(tops, known, *rows[:2], rows.top, rows.T, tau, status):
        logits, seen = _without_broken(logits, tops)
        tops = _tile_maxima(logits)
        cuts(tops, known, *rows[:2], rows.top, rows.T, tau, status)
        status += seen
    if parameters.truncated:
        floor = top_k_top_p(logits, torch.from_numpy(tops), parameters).cpu().numpy()
        wrong = floor == np.inf
        rows.T[wrong], status[wrong] = 0, status[wrong] | 8
        np.maximum(tau, floor, out=tau)
    _sample(logits, tops, tau, rows, first_id, measure=bool(want & LOGPROB))
    status[rows.top == -np.inf] += 4
    return _results(logits, rows, status, first_id, want)


def _results(
    logits: torch.Tensor, rows: _Rows, status: np.ndarray, first_id: int, want: int
) -> Sampled:
    """What is wanted of the rows, on the device of the logits."""

    def there(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(logits.device)

    token, logprob, kept, full_logprob, candidate = there(rows.token), None, None, None, None
    if want & LOGPROB:
        values = np.zeros(len(status), np.float32)
        on = (rows.T > 0) & (rows.kept > 0)
        values[on] = (rows.best[1, on] - rows.top[on]) / rows.T[on] - np.log(rows.mass[on])
        logprob = there(values)
    if want & KEPT:
        greedy = np.minimum(rows.kept, 1)
        kept = there(np.where(rows.T > 0, rows.kept, greedy).astype(np.int32))
    if want & FULL_LOGPROB:
        full_logprob = _full_logprob(logits, there(rows.T), token - first_id)
    if want & CANDIDATE:
        candidate = there(np.stack([rows.top, *rows.best]))
    return Sampled(token, there(status), logprob, kept, full_logprob, candidate)


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


def _full_logprob(logits: torch.Tensor, T: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """ln softmax(z/T)_token; 0 in greedy rows and where nothing is finite."""
    z = logits.float() / torch.where(T > 0, T, 1.0)[:, None]
    log_p = z.gather(1, token[:, None])[:, 0] - z.logsumexp(-1)
    return torch.where((T > 0) & log_p.isfinite(), log_p, 0.0)
