"""Sums of rows in torch, carried from tile to tile: what logit_stats.py and token_stats.py share.

A tile is reduced in blocks of `BLOCK` elements, on CPUs by `stats_loops.py`. Elsewhere, and in
fp64, of a block with maximum m one `softmax` p gives both sums: `Σ e^{z−m} = 1 / max p` and
`Σ e^{z−m}(z−m) = Σ p (z−m) / max p`. Sums are fp32, or fp64 if the logits are.
"""

import numpy as np
import torch

from autodeco_fast.lm_head import transform_
from autodeco_fast.numerics import compute_dtype
from autodeco_fast.stats import RowSums, moved

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


class RunningSums:
    """Sums of R rows, fed with tiles of the vocabulary from left to right.

    Ranks count against `threshold`; the target's own column never counts, and its tile's value is
    the one returned. With `cut`, sums at a temperature are over what is above the threshold, and
    the others are 0.
    """

    def __init__(
        self,
        column: torch.Tensor,
        threshold: torch.Tensor,
        inverse_temperature: torch.Tensor | None,
        cut: bool,
    ):
        R, new = column.shape[0], threshold.new_zeros
        self.column, self.threshold, self.inverse = column, threshold, inverse_temperature
        self.cut = cut
        self.max, self.target = new(R).fill_(_NOTHING), new(R).fill_(-float("inf"))
        self.argmax = torch.zeros_like(column)
        self.sums = new(2, R)
        self.scaled_sums = new(3, 0 if inverse_temperature is None else R)
        self.count = torch.zeros(R, device=column.device, dtype=torch.float64)

    def feed(self, x: torch.Tensor, start: int, scale: float, softcap: float | None) -> None:
        """Takes products or logits `[R, v]` of columns `start …`; may overwrite them."""
        if is_compiled(x):
            as_bits = x.dtype == torch.bfloat16 and scale == 1.0 and softcap is None
            x = x.view(torch.int16) if as_bits else transform_(x, scale, softcap)
            self._feed_compiled((_NONE[0], x.numpy()) if as_bits else (x.numpy(), _NONE[1]), start)
        else:
            self._feed(transform_(x, scale, softcap), start)

    def _feed_compiled(self, values: tuple[np.ndarray, np.ndarray], start: int) -> None:
        inverse = self.threshold[:0] if self.inverse is None else self.inverse
        state = (self.max, self.argmax, self.target, self.count, self.sums, self.scaled_sums)
        rows = [t.numpy() for t in (self.column, self.threshold, inverse, *state)]

        def work(some: slice) -> None:
            stats_loops.feed(
                *(v[some] for v in values), start, self.cut, *(x[..., some] for x in rows)
            )

        in_threads(work, len(self.column), max(v.size for v in values) // _WORTH_A_THREAD)

    def _feed(self, z: torch.Tensor, start: int) -> None:
        """In plain torch; z and p are the only tensors of a tile's size, and with `cut` a third."""
        p = torch.empty_like(z)
        self._count(z, start, p)
        tile_max = z.amax(-1).clamp_(min=_NOTHING)
        if len(better := (tile_max > self.max).nonzero()[:, 0]):
            self.argmax[better] = z[better].argmax(-1) + start
        new_max = torch.maximum(self.max, tile_max)
        d_old, d_tile, self.max = self.max - new_max, tile_max - new_max, new_max
        x = z.sub_(new_max[:, None]).clamp_(min=_FLOOR)
        if not self.cut:
            torch.softmax(x, -1, out=p)
            tile_s = d_tile.exp() / p.amax(-1)
            self.sums = torch.stack(moved(d_old, *self.sums))
            self.sums += torch.stack([tile_s, tile_s * p.mul_(x).sum(-1)])
        if self.inverse is None:
            return
        x.mul_(self.inverse[:, None])
        d_old = (d_old * self.inverse).clamp_(min=-1e9)
        self.scaled_sums = torch.stack(moved(d_old, *self.scaled_sums))
        if self.cut:
            tile_s = 1.0
            p.mul_(x.exp())  # p was 1 in the kept set; a tile may hold none of it
            zeroth = p.sum(-1)
        else:
            torch.softmax(x, -1, out=p)
            tile_s = zeroth = (d_tile * self.inverse).exp_() / p.amax(-1)
        first, second = p.mul_(x).sum(-1), p.mul_(x).sum(-1)
        self.scaled_sums += torch.stack([zeroth, tile_s * first, tile_s * second])

    def _count(self, z: torch.Tensor, start: int, above: torch.Tensor) -> None:
        """Leaves 1 in `above` where a logit is above the threshold, else 0."""
        torch.gt(z, self.threshold[:, None], out=above)
        self.count += above.sum(-1)  # at most WIDEST ones: exact in fp32
        column = self.column - start
        inside = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)[:, None]
        self.count -= above.gather(1, column)[:, 0] * inside
        self.target = torch.where(inside, z.gather(1, column)[:, 0], self.target)

    def so_far(self) -> RowSums:
        """The sums of what was fed."""
        nothing = self.max == _NOTHING
        top = self.max.masked_fill(nothing, -float("inf"))
        scaled = () if self.inverse is None else self.scaled_sums
        sums = [x.masked_fill(nothing, 0.0) for x in (*self.sums, *scaled)]
        ints = torch.stack([self.argmax, self.count.long()])
        return torch.stack([top, self.target, *sums]), ints


def is_compiled(x: torch.Tensor) -> bool:
    """Whether `stats_loops.py` takes these."""
    return x.device.type == "cpu" and compute_dtype(x) == torch.float32


def tiling(rows: int, V: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, rows of a block."""
    columns = min(V, max(COLUMNS, min(WIDEST, TILE // max(1, rows))))
    return TILE // columns, columns, max(1, BLOCK // columns)
