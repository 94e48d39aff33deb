"""Row statistics of logits and of an LM head's product, in torch: tiles that stay in the cache, one reused buffer."""

import torch

ROWS, COLUMNS = 512, 8192  # a fp32 tile of 16 MB; the product is near its best speed from here on
_KINDS = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.float32)


class _Running:
    """Online statistics of N rows, fed with vocabulary tiles from left to right."""

    def __init__(self, target: torch.Tensor, target_logit: torch.Tensor):
        n, device = target.shape[0], target.device
        self.target, self.target_logit = target, target_logit  # the logit that ranks count against
        self.tile_target = target_logit  # the same from its own tile: one rounding with the maximum, so the gap is ≥ 0
        self.max = torch.full((n,), -float("inf"), device=device)
        self.argmax = torch.zeros(n, dtype=torch.int64, device=device)
        self.s = torch.zeros(n, device=device)
        self.t = torch.zeros(n, device=device)
        self.rank = torch.zeros(n, dtype=torch.int64, device=device)

    def feed(self, z: torch.Tensor, start: int) -> None:
        """Takes transformed fp32 logits `[N, v]` of ids `start …`; overwrites them."""
        self.rank += (z > self.target_logit[:, None]).sum(-1)
        own = (
            self.target - start
        )  # the target's own column may round differently from the target logit: it never counts
        inside = (own >= 0) & (own < z.shape[1])
        column = own.clamp(0, z.shape[1] - 1)[:, None]
        own_logit = z.gather(1, column)[:, 0]
        self.rank -= (inside & (own_logit > self.target_logit)).long()
        self.tile_target = torch.where(inside, own_logit, self.tile_target)
        tile_max, tile_argmax = z.max(-1)
        self.argmax = torch.where(tile_max > self.max, tile_argmax + start, self.argmax)
        new_max = torch.maximum(self.max, tile_max)
        safe = new_max.masked_fill(new_max == -float("inf"), 0.0)
        shift = (self.max - safe).masked_fill_(self.max == -float("inf"), 0.0)
        z.sub_(safe[:, None]).clamp_(min=-200.0)  # e^{−200} is 0 in fp32, and 0·200 is 0 where 0·inf is not
        e = z.exp()
        decay = shift.exp()
        self.t = decay * (self.t + shift * self.s) + torch.bmm(e[:, None], z[:, :, None]).view(-1)
        self.s = decay * self.s + e.sum(-1)
        self.max = new_max

    def results(self) -> tuple[torch.Tensor, ...]:
        s = self.s.clamp(min=1e-30)
        log_s = s.log()
        entropy = (log_s - self.t / s).clamp_(min=0.0)
        return self.max, self.argmax, self.tile_target, self.max + log_s, self.rank, entropy


def _transform(x: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """fp32 logits: scale, then softcap; in place where x is fp32 already."""
    z = x.float()
    if scale != 1.0:
        z = z.mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


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
    parts = []
    for rows in valid.split(ROWS):
        y = target[rows]
        z_y = _transform(logits[rows, y].float().clone(), logit_scale, softcap)
        running = _Running(y, z_y)
        for start in range(0, logits.shape[1], COLUMNS):
            tile = logits[rows, start : start + COLUMNS].float()
            running.feed(_transform(tile, logit_scale, softcap), start)
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
    """Statistics of `hidden @ weight.T + bias`, one `[ROWS, COLUMNS]` tile of it at a time; ignored rows are not multiplied."""
    valid = (target != ignore_index).nonzero()[:, 0]
    V = weight.shape[0]
    tile = torch.empty(min(ROWS, max(1, len(valid))) * min(COLUMNS, V), dtype=hidden.dtype, device=hidden.device)
    parts = []
    for rows in valid.split(ROWS):
        h, y = hidden[rows], target[rows]
        z_y = torch.linalg.vecdot(h.float(), weight[y].float())
        if bias is not None:
            z_y = z_y + bias[y].float()
        z_y = _transform(z_y.to(hidden.dtype), logit_scale, softcap)
        running = _Running(y, z_y)
        for start in range(0, V, COLUMNS):
            w = weight[start : start + COLUMNS]
            out = tile[: len(rows) * len(w)].view(len(rows), len(w))
            if bias is None:
                torch.mm(h, w.T, out=out)
            else:
                torch.addmm(bias[start : start + COLUMNS], h, w.T, out=out)
            running.feed(_transform(out, logit_scale, softcap), start)
        parts.append(running.results())
    return scatter(valid, parts, target.shape[0])
