"""Row statistics of logits and of an LM head's product, in torch.

The product is made in tiles of `TILE` elements, in one reused buffer, and a tile is reduced in
blocks of `BLOCK` elements: on CPUs by `stats_loops.py`. Elsewhere, and in fp64, of a block with
maximum m one `softmax` p gives both sums: `Σ e^{z−m} = 1 / max p` and
`Σ e^{z−m}(z−m) = Σ p (z−m) / max p`. Sums are fp32, or fp64 if the logits are.
"""

import numpy as np
import torch

from autodeco_fast.stats import IGNORED, Part, moved, neutral

from . import stats_loops
from .jit import in_threads

TILE = 1 << 22  # elements of the product a time: 16 MB of fp32
COLUMNS = 2048  # narrowest tile; fewer rows make it wider, up to WIDEST
WIDEST = 1 << 16
BLOCK = 1 << 20  # elements reduced a time: 4 MB of fp32
_WORTH_A_THREAD = 1 << 18  # elements for each thread that is woken
_NOTHING = float(stats_loops.NOTHING)
_FLOOR = -1e5  # e^x is 0 there at any T below 900, and 0·x² is 0 where 0·inf is not
_NONE = np.empty((0, 0), np.float32), np.empty((0, 0), np.int16)


class _Running:
    """Statistics of R rows, fed with vocabulary tiles from left to right: a part, see
    `stats_partial`.

    Ranks count against `threshold`; the target's own column never counts, and its tile's value is
    the one returned.
    """

    def __init__(
        self,
        column: torch.Tensor,
        threshold: torch.Tensor,
        inverse_temperature: torch.Tensor | None,
    ):
        R, new = column.shape[0], threshold.new_zeros
        self.column, self.threshold, self.inverse = column, threshold, inverse_temperature
        self.max, self.target = new(R).fill_(_NOTHING), new(R).fill_(-float("inf"))
        self.argmax = torch.zeros_like(column)
        self.sums = new(2, R)
        self.scaled_sums = new(3, 0 if inverse_temperature is None else R)
        self.count = torch.zeros(R, device=column.device, dtype=torch.float64)

    def feed(self, x: torch.Tensor, start: int, scale: float, softcap: float | None) -> None:
        """Takes products or logits `[R, v]` of columns `start …`; may overwrite them."""
        if is_compiled(x):
            brief = x.dtype == torch.bfloat16 and scale == 1.0 and softcap is None
            x = x.view(torch.int16) if brief else transform(x, scale, softcap)
            self._feed_compiled((_NONE[0], x.numpy()) if brief else (x.numpy(), _NONE[1]), start)
        else:
            self._feed(transform(x, scale, softcap), start)

    def _feed_compiled(self, values: tuple[np.ndarray, np.ndarray], start: int) -> None:
        inverse = self.threshold[:0] if self.inverse is None else self.inverse
        state = (self.max, self.argmax, self.target, self.count, self.sums, self.scaled_sums)
        rows = [t.numpy() for t in (self.column, self.threshold, inverse, *state)]

        def work(own: slice) -> None:
            stats_loops.feed(*(v[own] for v in values), start, *(x[..., own] for x in rows))

        in_threads(work, len(self.column), max(v.size for v in values) // _WORTH_A_THREAD)

    def _feed(self, z: torch.Tensor, start: int) -> None:
        p = torch.empty_like(z)
        self._count(z, start, p)
        tile_max = z.amax(-1).clamp_(min=_NOTHING)
        if len(better := (tile_max > self.max).nonzero()[:, 0]):
            self.argmax[better] = z[better].argmax(-1) + start
        new_max = torch.maximum(self.max, tile_max)
        d_old, d_tile, self.max = self.max - new_max, tile_max - new_max, new_max
        z.sub_(new_max[:, None]).clamp_(min=_FLOOR)
        torch.softmax(z, -1, out=p)
        tile_s = d_tile.exp() / p.amax(-1)
        self.sums = torch.stack(moved(d_old, *self.sums))
        self.sums += torch.stack([tile_s, tile_s * p.mul_(z).sum(-1)])
        if self.inverse is not None:
            x = z.mul_(self.inverse[:, None])
            torch.softmax(x, -1, out=p)
            tile_s = (d_tile * self.inverse).exp_() / p.amax(-1)
            first, second = p.mul_(x).sum(-1), p.mul_(x).sum(-1)
            self.scaled_sums = torch.stack(
                moved((d_old * self.inverse).clamp_(min=-1e9), *self.scaled_sums)
            )
            self.scaled_sums += torch.stack([tile_s, tile_s * first, tile_s * second])

    def _count(self, z: torch.Tensor, start: int, above: torch.Tensor) -> None:
        torch.gt(z, self.threshold[:, None], out=above)
        self.count += above.sum(-1)  # at most WIDEST ones: exact in fp32
        column = self.column - start
        inside = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)[:, None]
        self.count -= above.gather(1, column)[:, 0] * inside
        self.target = torch.where(inside, z.gather(1, column)[:, 0], self.target)

    def part(self) -> Part:
        nothing = self.max == _NOTHING
        sums = [
            x.masked_fill(nothing, 0.0)
            for x in (*self.sums, *(() if self.inverse is None else self.scaled_sums))
        ]
        return torch.stack(
            [self.max.masked_fill(nothing, -float("inf")), self.target, *sums]
        ), torch.stack([self.argmax, self.count.long()])


def is_compiled(x: torch.Tensor) -> bool:
    """Whether `stats_loops.py` takes these."""
    return x.device.type == "cpu" and kind_of(x) == torch.float32


def kind_of(x: torch.Tensor) -> torch.dtype:
    """What sums over these are taken in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def transform(x: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Logits in fp32 (or fp64): scale, then softcap; in place where x has that type already."""
    z = x.to(kind_of(x))
    if scale != 1.0:
        z = z.mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _tiling(rows: int, V: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, rows of a block."""
    columns = min(V, max(COLUMNS, min(WIDEST, TILE // max(1, rows))))
    return TILE // columns, columns, max(1, BLOCK // columns)


def scatter(
    rows: torch.Tensor, parts: list[Part], n: int, like: torch.Tensor, scaled: bool
) -> Part:
    """Puts parts of these rows, in order, into one of n rows; the others are ignored."""
    whole = neutral(n, like, kind_of(like), scaled)
    for target, pieces in zip(whole, zip(*parts)):
        target[:, rows] = torch.cat(pieces, 1)
    return whole


def logit_stats(
    logits: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Part:
    """Same arguments and results as `kernels.logit_stats.logit_stats`."""
    valid = (column != IGNORED).nonzero()[:, 0]
    V, compiled = logits.shape[1], is_compiled(logits)
    columns = V if compiled else _tiling(len(valid), V)[1]
    block = max(1, BLOCK // columns)
    as_they_are = (
        compiled
        and len(valid) == len(logits)
        and scale == 1.0
        and softcap is None
        and logits.is_contiguous()
    )
    parts = []
    for i, rows in enumerate(valid.split(block)):
        y = column[rows]
        against = (
            transform(logits[rows, y], scale, softcap) if threshold is None else threshold[rows]
        )
        running = _Running(
            y, against, None if inverse_temperature is None else inverse_temperature[rows]
        )
        for start in range(0, V, columns):
            x = (
                logits[i * block : (i + 1) * block]
                if as_they_are
                else logits[rows, start : start + columns]
            )
            running.feed(x, start, scale, softcap)
        parts.append(running.part())
    return scatter(valid, parts, len(column), logits, inverse_temperature is not None)


def multiply(
    h: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """`h @ w.T + bias` into the front of a flat buffer."""
    out = out[: len(h) * len(w)].view(len(h), len(w))
    return torch.mm(h, w.T, out=out) if bias is None else torch.addmm(bias, h, w.T, out=out)


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    threshold: torch.Tensor | None,
    inverse_temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Part:
    """Same arguments and results as `kernels.token_stats.token_stats`; ignored rows are not
    multiplied."""
    valid = (column != IGNORED).nonzero()[:, 0]
    V = weight.shape[0]
    tile_rows, columns, block = _tiling(len(valid), V)
    tile = torch.empty(
        min(tile_rows, len(valid)) * columns, dtype=hidden.dtype, device=hidden.device
    )
    parts = []
    for rows in valid.split(tile_rows):
        h = hidden[rows]
        running = []
        for part, h_block in zip(rows.split(block), h.split(block)):
            y = column[part]
            own = (
                None
                if threshold is not None
                else target_logit(h_block, weight, y, bias, scale, softcap)
            )
            inverse = None if inverse_temperature is None else inverse_temperature[part]
            running.append(_Running(y, own if threshold is None else threshold[part], inverse))
        for start in range(0, V, columns):
            end = start + columns
            out = multiply(h, weight[start:end], None if bias is None else bias[start:end], tile)
            for one, x in zip(running, out.split(block)):
                one.feed(x, start, scale, softcap)
        parts.extend(one.part() for one in running)
    return scatter(valid, parts, len(column), hidden, inverse_temperature is not None)


def target_logit(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """The targets' logits `[R]` from a product of their own, rounded as the product is; −inf where
    the column is < 0."""
    kind, own = kind_of(hidden), column.clamp(min=0)
    z = torch.linalg.vecdot(hidden.to(kind), weight[own].to(kind))
    z = z if bias is None else z + bias[own].to(kind)
    return transform(z.to(hidden.dtype), scale, softcap).masked_fill(column < 0, -float("inf"))
