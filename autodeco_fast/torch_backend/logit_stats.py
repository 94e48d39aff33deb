"""Row statistics of logits and of an LM head's product, in torch.

The product is made in tiles of `TILE` elements, in one reused buffer, and each tile is reduced in blocks of `BLOCK`
elements, small enough for the second-level caches. Of a block with maximum m, one `softmax` p gives both sums:
`Σ e^{z−m} = 1 / max p` and `Σ e^{z−m}(z−m) = Σ p (z−m) / max p`.
"""

import torch

TILE = 1 << 22  # elements of the product a time: 16 MB of fp32
COLUMNS = 2048  # narrowest tile; fewer rows make it wider, up to WIDEST
WIDEST = 1 << 16
BLOCK = 1 << 19  # elements reduced a time: 2 MB of fp32
_FLOOR = -200.0  # e^{−200} is 0 in fp32, and 0·(−200) is 0 where 0·(−inf) is not
_KINDS = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.float32)


class _Running:
    """Statistics of R rows, fed with vocabulary tiles from left to right.

    `target_logit` is what ranks count against. It comes from a product of its own, so it can round differently from the
    target's column in its tile: that column never counts, and its tile's value is the one returned, so no gap is < 0.
    """

    def __init__(self, target: torch.Tensor, target_logit: torch.Tensor):
        R, device = target.shape[0], target.device
        self.target, self.target_logit, self.tile_target = target, target_logit, target_logit
        self.max = torch.full((R,), -float("inf"), device=device)
        self.argmax = torch.zeros(R, dtype=torch.int64, device=device)
        self.s = torch.zeros(R, device=device)  # Σ e^{z−max}
        self.t = torch.zeros(R, device=device)  # Σ e^{z−max}(z−max)
        self.rank = torch.zeros(R, device=device, dtype=torch.float64)

    def feed(self, z: torch.Tensor, start: int, spare: torch.Tensor) -> None:
        """Takes transformed fp32 logits `[R, v]` of ids `start …`; overwrites them and `spare`, fp32, R·v or more."""
        p = spare[: z.numel()].view(z.shape)
        self._count(z, start, p)
        tile_max = z.amax(-1)
        better = (tile_max > self.max).nonzero()[:, 0]
        if len(better):  # few rows after the first tiles: an index costs more than a maximum
            candidates = z if len(better) == len(z) else z[better]
            self.argmax[better] = candidates.argmax(-1) + start
        new_max = torch.maximum(self.max, tile_max)
        z.sub_(tile_max.masked_fill(tile_max == -float("inf"), 0.0)[:, None]).clamp_(min=_FLOOR)
        torch.softmax(z, -1, out=p)
        tile_s = (1.0 / p.amax(-1)).masked_fill_(tile_max == -float("inf"), 0.0)
        tile_t = tile_s * torch.linalg.vecdot(p, z)
        s, t = self._moved(self.s, self.t, self.max, new_max)
        tile_s, tile_t = self._moved(tile_s, tile_t, tile_max, new_max)
        self.s, self.t, self.max = s + tile_s, t + tile_t, new_max

    def _count(self, z: torch.Tensor, start: int, above: torch.Tensor) -> None:
        torch.gt(z, self.target_logit[:, None], out=above)
        self.rank += above.sum(-1)  # at most WIDEST ones: exact in fp32
        column = self.target - start
        inside = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)[:, None]
        self.rank -= above.gather(1, column)[:, 0] * inside
        self.tile_target = torch.where(inside, z.gather(1, column)[:, 0], self.tile_target)

    @staticmethod
    def _moved(s: torch.Tensor, t: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of maximum `old`, for the maximum `new`."""
        shift = (old - new).masked_fill_(old == -float("inf"), 0.0)  # then s = t = 0
        decay = shift.exp()
        return decay * s, decay * (t + shift * s)

    def results(self) -> tuple[torch.Tensor, ...]:
        s = self.s.clamp(min=1e-30)  # 0 only where every logit is −inf
        log_s = s.log()
        entropy = (log_s - self.t / s).clamp_(min=0.0)
        rank = self.rank.long()
        is_max = self.tile_target == self.max  # rank 0 exactly then, whatever the two products rounded to
        rank = torch.where(is_max, 0, torch.where(rank == 0, 1, rank))
        return self.max, self.argmax, self.tile_target, self.max + log_s, rank, entropy


def transform(x: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """fp32 logits: scale, then softcap; in place where x is fp32 already."""
    z = x.float()
    if scale != 1.0:
        z = z.mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _tiling(rows: int, V: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, rows of a block."""
    columns = min(V, max(COLUMNS, min(WIDEST, TILE // max(1, rows))))
    return TILE // columns, columns, max(1, BLOCK // columns)


def scatter(valid: torch.Tensor, parts: list[tuple[torch.Tensor, ...]], n: int) -> tuple[torch.Tensor, ...]:
    """Puts the valid rows' results back; the others get 0 and rank −1."""
    out = tuple(torch.zeros(n, dtype=kind, device=valid.device) for kind in _KINDS)
    out[4].fill_(-1)
    for column, target in zip(zip(*parts), out):
        target[valid] = torch.cat(column)
    return out


def logit_stats(
    logits: torch.Tensor, target: torch.Tensor, logit_scale: float, softcap: float | None, ignore_index: int
) -> tuple[torch.Tensor, ...]:
    """Same arguments and results as `kernels.logit_stats.logit_stats`."""
    valid = (target != ignore_index).nonzero()[:, 0]
    V = logits.shape[1]
    _, columns, block = _tiling(len(valid), V)
    spare = torch.empty(block * columns, dtype=torch.float32, device=logits.device)
    parts = []
    for rows in valid.split(block):
        y = target[rows]
        running = _Running(y, transform(logits[rows, y], logit_scale, softcap))
        for start in range(0, V, columns):
            running.feed(transform(logits[rows, start : start + columns], logit_scale, softcap), start, spare)
        parts.append(running.results())
    return scatter(valid, parts, target.shape[0])


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[torch.Tensor, ...]:
    """Statistics of `hidden @ weight.T + bias`, one tile of it at a time; ignored rows are not multiplied."""
    valid = (target != ignore_index).nonzero()[:, 0]
    V = weight.shape[0]
    tile_rows, columns, block = _tiling(len(valid), V)
    tile = torch.empty(min(tile_rows, len(valid)) * columns, dtype=hidden.dtype, device=hidden.device)
    spare = torch.empty(min(block, len(valid)) * columns, dtype=torch.float32, device=hidden.device)
    parts = []
    for rows in valid.split(tile_rows):
        h = hidden[rows]
        running = [
            _Running(y, transform(_target_product(h_block, weight, y, bias), logit_scale, softcap))
            for h_block, y in zip(h.split(block), target[rows].split(block))
        ]
        for start in range(0, V, columns):
            w = weight[start : start + columns]
            out = tile[: len(rows) * len(w)].view(len(rows), len(w))
            if bias is None:
                torch.mm(h, w.T, out=out)
            else:
                torch.addmm(bias[start : start + columns], h, w.T, out=out)
            for one, x in zip(running, out.split(block)):
                one.feed(transform(x, logit_scale, softcap), start, spare)
        parts.extend(one.results() for one in running)
    return scatter(valid, parts, target.shape[0])


def _target_product(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The targets' raw logits `[R]`, rounded to the product's dtype."""
    z = torch.linalg.vecdot(hidden.float(), weight[target].float())
    return (z if bias is None else z + bias[target].float()).to(hidden.dtype)
