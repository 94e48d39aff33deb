"""Row statistics of logits and of an LM head's product, in torch.

The product is made in tiles of `TILE` elements, in one reused buffer, and each tile is reduced in blocks of `BLOCK`
elements, small enough for the second-level caches. Of a block with maximum m, one `softmax` p gives both sums:
`Σ e^{z−m} = 1 / max p` and `Σ e^{z−m}(z−m) = Σ p (z−m) / max p`. Sums are fp32, or fp64 if the logits are.
"""

import torch

from .stats_partial import IGNORED, Part, moved, neutral

TILE = 1 << 22  # elements of the product a time: 16 MB of fp32
COLUMNS = 2048  # narrowest tile; fewer rows make it wider, up to WIDEST
WIDEST = 1 << 16
BLOCK = 1 << 20  # elements reduced a time: 4 MB of fp32
_NOTHING = -1e30  # stands for a maximum of −inf, so that differences are finite
_FLOOR = -1e5  # e^x is 0 there at any T below 900, and 0·x² is 0 where 0·inf is not


def _argmax(z: torch.Tensor) -> torch.Tensor:
    """The lowest id of each row's maximum. numpy's is several times faster than torch's on a CPU."""
    return torch.from_numpy(z.numpy().argmax(1)) if z.device.type == "cpu" else z.argmax(-1)


class _Running:
    """Statistics of R rows, fed with vocabulary tiles from left to right: a part, see `stats_partial`.

    Ranks count against `threshold`; the target's own column never counts, and its tile's value is the one returned.
    """

    def __init__(self, column: torch.Tensor, threshold: torch.Tensor, inverse_temperature: torch.Tensor | None):
        R, new = column.shape[0], threshold.new_zeros
        self.column, self.threshold, self.inverse = column, threshold, inverse_temperature
        self.max, self.target = new(R).fill_(_NOTHING), new(R).fill_(-float("inf"))
        self.argmax = torch.zeros_like(column)
        self.sums = [new(R), new(R)]
        self.scaled_sums = [new(R), new(R), new(R)]
        self.count = torch.zeros(R, device=column.device, dtype=torch.float64)

    def feed(self, z: torch.Tensor, start: int, spare: torch.Tensor) -> None:
        """Takes transformed logits `[R, v]` of columns `start …`; overwrites them and `spare`, R·v or more."""
        p = spare[: z.numel()].view(z.shape)
        self._count(z, start, p)
        best = _argmax(z)[:, None] if start == 0 else None  # later few rows have a better one, and an index costs more
        highest = lambda x: x.amax(-1) if best is None else x.gather(1, best)[:, 0]  # noqa: E731
        tile_max = highest(z).clamp_(min=_NOTHING)
        if best is not None:
            self.argmax = best[:, 0]
        elif len(better := (tile_max > self.max).nonzero()[:, 0]):
            self.argmax[better] = _argmax(z[better]) + start
        new_max = torch.maximum(self.max, tile_max)
        d_old, d_tile, self.max = self.max - new_max, tile_max - new_max, new_max
        z.sub_(new_max[:, None]).clamp_(min=_FLOOR)
        s, t = moved(d_old, *self.sums)
        torch.softmax(z, -1, out=p)
        tile_s = d_tile.exp() / highest(p)
        self.sums = [s + tile_s, t + tile_s * p.mul_(z).sum(-1)]
        if self.inverse is not None:
            x = z.mul_(self.inverse[:, None])
            s, t, q = moved((d_old * self.inverse).clamp_(min=-1e9), *self.scaled_sums)
            torch.softmax(x, -1, out=p)
            tile_s = (d_tile * self.inverse).exp_() / highest(p)
            first, second = p.mul_(x).sum(-1), p.mul_(x).sum(-1)
            self.scaled_sums = [s + tile_s, t + tile_s * first, q + tile_s * second]

    def _count(self, z: torch.Tensor, start: int, above: torch.Tensor) -> None:
        torch.gt(z, self.threshold[:, None], out=above)
        self.count += above.sum(-1)  # at most WIDEST ones: exact in fp32
        column = self.column - start
        inside = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)[:, None]
        self.count -= above.gather(1, column)[:, 0] * inside
        self.target = torch.where(inside, z.gather(1, column)[:, 0], self.target)

    def part(self) -> Part:
        scaled = [] if self.inverse is None else self.scaled_sums
        nothing = self.max == _NOTHING
        sums = [x.masked_fill(nothing, 0.0) for x in (*self.sums, *scaled)]
        return torch.stack([self.max.masked_fill(nothing, -float("inf")), self.target, *sums]), torch.stack(
            [self.argmax, self.count.long()]
        )


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


def scatter(rows: torch.Tensor, parts: list[Part], n: int, like: torch.Tensor, scaled: bool) -> Part:
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
    V = logits.shape[1]
    _, columns, block = _tiling(len(valid), V)
    spare = torch.empty(block * columns, dtype=kind_of(logits), device=logits.device)
    parts = []
    for rows in valid.split(block):
        y = column[rows]
        against = transform(logits[rows, y], scale, softcap) if threshold is None else threshold[rows]
        running = _Running(y, against, None if inverse_temperature is None else inverse_temperature[rows])
        for start in range(0, V, columns):
            running.feed(transform(logits[rows, start : start + columns], scale, softcap), start, spare)
        parts.append(running.part())
    return scatter(valid, parts, len(column), logits, inverse_temperature is not None)


def multiply(h: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
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
    """Same arguments and results as `kernels.token_stats.token_stats`; ignored rows are not multiplied."""
    valid = (column != IGNORED).nonzero()[:, 0]
    V = weight.shape[0]
    tile_rows, columns, block = _tiling(len(valid), V)
    tile = torch.empty(min(tile_rows, len(valid)) * columns, dtype=hidden.dtype, device=hidden.device)
    spare = torch.empty(min(block, len(valid)) * columns, dtype=kind_of(hidden), device=hidden.device)
    parts = []
    for rows in valid.split(tile_rows):
        h = hidden[rows]
        running = []
        for part, h_block in zip(rows.split(block), h.split(block)):
            y = column[part]
            own = None if threshold is not None else target_logit(h_block, weight, y, bias, scale, softcap)
            inverse = None if inverse_temperature is None else inverse_temperature[part]
            running.append(_Running(y, own if threshold is None else threshold[part], inverse))
        for start in range(0, V, columns):
            end = start + columns
            out = multiply(h, weight[start:end], None if bias is None else bias[start:end], tile)
            for one, x in zip(running, out.split(block)):
                one.feed(transform(x, scale, softcap), start, spare)
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
    """The targets' logits `[R]` from a product of their own, rounded as the product is; −inf where the column is < 0."""
    kind, own = kind_of(hidden), column.clamp(min=0)
    z = torch.linalg.vecdot(hidden.to(kind), weight[own].to(kind))
    z = z if bias is None else z + bias[own].to(kind)
    return transform(z.to(hidden.dtype), scale, softcap).masked_fill(column < 0, -float("inf"))
