"""Row statistics of a part of the vocabulary, and how parts become a whole.

A part is two tensors. With m the part's largest logit and x = (z − m)/T:

    floats [4 or 7, N]   m, z_y (−inf where another part holds y), s = Σ e^{z−m}, t = Σ e^{z−m}(z−m);
                         with temperatures also Σ e^x, Σ e^x x, Σ e^x x²
    ints   [2, N] int64  argmax in the whole vocabulary, |{i ≠ y: z_i > threshold}|, or −1 in ignored rows

For another maximum m' = m − d the sums are e^d s, e^d (t + d s), e^d (q + 2 d t + d² s): exact, so
the merge is in any order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

Part = tuple[torch.Tensor, torch.Tensor]
IGNORED = -2  # as a column: the row is not looked at
ABSENT = -1  # as a column: another part holds the target


class TokenStats(NamedTuple):
    """Per-row statistics of the logits z, each `[N]`. Rows whose target is ignored hold 0, and rank
    −1.

    fp32, or fp64 where the logits are.
    """

    max_logit: torch.Tensor
    argmax: torch.Tensor  # int64, the lowest id on ties
    target_logit: torch.Tensor
    logsumexp: torch.Tensor
    rank: (
        torch.Tensor
    )  # int64: ids with a strictly larger logit than the target; 0 = the target is an argmax
    entropy: torch.Tensor  # nats, of softmax(z)
    temperature: torch.Tensor | None = None  # T of the following, at least 0.01
    scaled_logsumexp: torch.Tensor | None = None  # of z/T, differentiable in T
    scaled_entropy: torch.Tensor | None = None  # nats, of softmax(z/T), differentiable in T
    kept: torch.Tensor | None = None  # int64: tokens that Min-P keeps at T

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


def neutral(n: int, like: torch.Tensor, kind: torch.dtype, scaled: bool) -> Part:
    """A part of n ignored rows."""
    floats = torch.zeros(7 if scaled else 4, n, dtype=kind, device=like.device)
    ints = torch.zeros(2, n, dtype=torch.int64, device=like.device)
    ints[1] = -1
    return floats, ints


def merge(parts: Sequence[Part], inverse_temperature: torch.Tensor | None) -> Part:
    """One part of several; `inverse_temperature` `[N]` or None."""
    if len(parts) == 1:
        return parts[0]
    floats, ints = torch.stack([f for f, _ in parts]), torch.stack([i for _, i in parts])
    maxima = floats[:, 0]
    top = maxima.amax(0)
    d = torch.where(maxima == top, 0.0, maxima - top).clamp(
        min=-1e30
    )  # a part of −inf alone has no sums to move
    rows = [top, floats[:, 1].amax(0), *(x.sum(0) for x in moved(d, floats[:, 2], floats[:, 3]))]
    if inverse_temperature is not None:
        dx = (d * inverse_temperature).clamp(min=-1e9)  # its square is finite
        rows += [x.sum(0) for x in moved(dx, floats[:, 4], floats[:, 5], floats[:, 6])]
    largest = torch.iinfo(torch.int64).max
    argmax = torch.where(maxima == top, ints[:, 0], largest).amin(0)
    return torch.stack(rows), torch.stack([argmax, ints[:, 1].sum(0)])


def finish(part: Part, temperature: torch.Tensor | None) -> list[torch.Tensor]:
    """The statistics, `[N]` each: max, argmax, target, logsumexp, rank, entropy; at T also
    logsumexp, mean, variance of z.

    Ignored rows are 0 everywhere, rank −1. The threshold that ranks were counted against comes from
    a product of its own and may round differently from the tile's z_y, so rank 0 is decided by z_y:
    it is 0 exactly where z_y is the maximum.
    """
    (top, target, s, t, *scaled), (argmax, count) = part
    ignored = count < 0
    rank = torch.where(target == top, 0, count.clamp(min=1))
    mass = s.clamp(min=1e-30)  # 0 only where every logit is −inf
    log_mass = mass.log()
    entropy = (log_mass - t / mass).clamp_(min=0.0)
    out = [top, argmax, target, top + log_mass, rank, entropy]
    if scaled:
        mass = scaled[0].clamp(min=1e-30)
        mean = scaled[1] / mass
        variance = (scaled[2] / mass - mean * mean).clamp_(min=0.0)
        out += [
            top / temperature + mass.log(),
            top + temperature * mean,
            temperature * temperature * variance,
        ]
    return [x.masked_fill(ignored, -1 if i == 4 else 0) for i, x in enumerate(out)]
