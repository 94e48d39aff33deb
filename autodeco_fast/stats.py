"""Row statistics: the sums that backends make of a row's logits, and what is computed from them.

Row sums are two tensors. With m the largest logit seen and x = (z − m)/T:

    floats [4 or 7, N]   m, z_y (−inf where another rank holds y), s = Σ e^{z−m},
                         t = Σ e^{z−m}(z−m); with temperatures also Σ e^x, Σ e^x x, Σ e^x x²
    ints   [2, N] int64  argmax in the whole vocabulary; |{i ≠ y: z_i > threshold}|, or −1 in
                         ignored rows

Of a cut, the sums at a temperature are over {i: z_i > threshold} alone, and s = t = 0.

For another maximum m' = m − d the sums are e^d s, e^d (t + d s), e^d (q + 2 d t + d² s): exact, so
they can be joined in any order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from autodeco_fast.numerics import compute_dtype

RowSums = tuple[torch.Tensor, torch.Tensor]  # floats, ints
IGNORED = -2  # as a target's column: the row is not looked at
ABSENT = -1  # as a target's column: another rank holds it


class TokenStats(NamedTuple):
    """Statistics of each row's logits z, `[N]` each, fp32, or fp64 where the logits are.

    Rows whose target is ignored hold 0, and rank −1.
    """

    max_logit: torch.Tensor
    argmax: torch.Tensor  # int64, the lowest id on ties
    target_logit: torch.Tensor
    logsumexp: torch.Tensor
    rank: torch.Tensor  # int64: ids with a logit strictly above the target's; 0: it is an argmax
    entropy: torch.Tensor  # nats, of softmax(z)
    temperature: torch.Tensor | None = None  # T of the following, at least 0.01
    scaled_logsumexp: torch.Tensor | None = None  # of z/T, differentiable in T
    # nats, of softmax(z/T), differentiable in T; with `cut` both are over the kept set alone
    scaled_entropy: torch.Tensor | None = None
    kept: torch.Tensor | None = None  # int64: tokens that Min-P keeps at T
    # ln Σ e^{(z − max z)/T}, what `scaled_logsumexp` is more than max z / T
    scaled_log_mass: torch.Tensor | None = None

    @property
    def gap(self) -> torch.Tensor:
        """`max z − z_y ≥ 0`."""
        return self.max_logit - self.target_logit

    @property
    def target_prob(self) -> torch.Tensor:
        """`softmax(z)_y`."""
        return (self.target_logit - self.logsumexp).exp()

    @property
    def scaled_log_prob(self) -> torch.Tensor:
        """`ln softmax(z/T)_y`, differentiable in T; with `cut` over the kept set, for a y in it.

        Of differences of logits: `z_y/T − scaled_logsumexp` loses what z/T is larger than these.
        """
        return -self.gap / self.temperature - self.scaled_log_mass

    def rows(self, index: torch.Tensor | slice) -> "TokenStats":
        """The statistics of these rows."""
        return TokenStats(*(None if field is None else field[index] for field in self))


def moved(
    d: torch.Tensor, s: torch.Tensor, t: torch.Tensor, q: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Sums of x⁰, x¹ and x² after x grew by d."""
    decay = d.exp()
    sums = [decay * s, decay * (t + d * s)]
    return sums if q is None else [*sums, decay * (q + d * (2 * t + d * s))]


def scatter(
    rows: torch.Tensor, sums: Sequence[RowSums], n: int, like: torch.Tensor, scaled: bool
) -> RowSums:
    """Row sums of n rows, from those of `rows`, in order; the others are ignored."""
    floats = like.new_zeros(7 if scaled else 4, n, dtype=compute_dtype(like))
    ints = rows.new_zeros(2, n)
    ints[1] = -1
    for whole, chunks in zip((floats, ints), zip(*sums)):
        whole[:, rows] = torch.cat(chunks, 1)
    return floats, ints


def finish(sums: RowSums) -> list[torch.Tensor]:
    """The first six fields of `TokenStats`, `[N]` each.

    Ignored rows are 0 everywhere, rank −1. The threshold that ranks were counted against comes from
    a product of its own and may round differently from the tile's z_y, so rank 0 is decided by z_y:
    it is 0 exactly where z_y is the maximum. A kernel's maximum leaves NaN out, its sums do not:
    where they are NaN it is, too, so that no loss of the row can be a number.
    """
    (top, target, s, t), (argmax, count) = sums
    top = torch.where(s.isnan() & (top < torch.inf), torch.nan, top)
    rank = torch.where(target == top, 0, count.clamp(min=1))
    mass = s.clamp(min=1e-30)  # 0 only where every logit is −inf
    log_mass = mass.log()
    entropy = (log_mass - t / mass).clamp_(min=0.0)
    out = [top, argmax, target, top + log_mass, rank, entropy]
    return [x.masked_fill(count < 0, -1 if i == 4 else 0) for i, x in enumerate(out)]


def at_temperature(scaled: torch.Tensor, ignored: torch.Tensor) -> list[torch.Tensor]:
    """ln Σ e^x, mean and variance of x under e^x / Σ e^x, `[N]` each; 0 where ignored.

    Args:
        scaled: `[3, N]`, Σ e^x, Σ e^x x, Σ e^x x² of x = (z − max z)/T.
        ignored: bool `[N]`.
    """
    mass = scaled[0].clamp(min=1e-30)
    mean = scaled[1] / mass
    variance = (scaled[2] / mass - mean * mean).clamp_(min=0.0)
    return [x.masked_fill(ignored, 0) for x in (mass.log(), mean, variance)]
