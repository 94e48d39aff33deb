"""Cuts from the row's own logits, at a fixed temperature.

Tokens that a processor has masked (−inf) are no part of the row here.
"""

from dataclasses import dataclass, replace

import torch

from autodeco_fast.ops.logit_stats import logit_stats
from autodeco_fast.options import documented, option
from autodeco_fast.policies.base import Cut, Policy
from autodeco_fast.policies.temperature import divisor

HEAD = 256  # Min-k: the largest logits that are looked at before the whole row is sorted


@dataclass(frozen=True, kw_only=True)
class _Rule(Policy):
    """A cut from the logits, at one temperature."""

    cuts_by_row = True
    temperature: float = option("T", 1.0, must_be="≥ 0")

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> float:
        return self.temperature

    def _at_least(self, min_p: torch.Tensor) -> Cut:
        """The stricter of a row's cut and the policy's own Min-P. A cut deeper than 87 nats is
        held there: what lies below is never drawn."""
        lowest = max(self.min_p, torch.finfo(torch.float32).tiny)
        return Cut(min_p=min_p.clamp(lowest, 1.0))


@documented
@dataclass(frozen=True, kw_only=True)
class TopNSigma(_Rule):
    """Top-nσ: keeps `z ≥ max z − n · σ(z)`, σ the standard deviation of the row's logits.

    The same tokens at every temperature. Tang, Liu, Xu, Huang 2024, arXiv:2411.07641. σ divides by
    the number of tokens.
    """

    kind = "top_n_sigma"
    n: float = option("standard deviations below the maximum", 1.0, must_be="≥ 0")

    def cut(self, scaled: torch.Tensor | None) -> Cut:
        return self._at_least((-self.n * _deviation(scaled)).exp())


def _is_whole(z: torch.Tensor) -> bool:
    """Whether nothing is known to be masked; looked for on a CPU alone, where looking is cheap."""
    return z.is_cpu and bool(z.amin() > -torch.inf)


def _deviation(z: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the logits that are not −inf, `[B, V]` → `[B]`, at most 1e30; 0 where
    there is none."""
    if _is_whole(z):
        count, spread = z.shape[1], z - z.mean(1, keepdim=True)
    else:
        masked = z == -torch.inf
        count = (z.shape[1] - masked.sum(1)).clamp(min=1)
        mean = z.masked_fill(masked, 0.0).sum(1) / count
        spread = torch.where(masked, 0.0, z - mean[:, None])
    # The logits of greedy rows are huge, and their squares too large for fp32.
    return (torch.linalg.vector_norm(spread, dim=1) / count**0.5).clamp(max=1e30)


@documented
@dataclass(frozen=True, kw_only=True)
class PLess(_Rule):
    """p-less: keeps `p_i ≥ Σ_j p_j²`, p = softmax(z/T): what is at least as likely as two draws
    being the same.

    Tan, Wu, Howard 2025, arXiv:2509.23234. `ln Σp²` is a difference of two logsumexps, of 2z/T and
    z/T, both of one read.
    """

    kind = "p_less"

    def cut(self, scaled: torch.Tensor | None) -> Cut:
        B = scaled.shape[0]
        target = torch.zeros(B, dtype=torch.int64, device=scaled.device)
        half = torch.full((B,), 0.5, device=scaled.device)
        stats = logit_stats(scaled, target, temperature=half)
        least = stats.scaled_logsumexp - stats.logsumexp  # the lowest logit kept
        return self._at_least((least - stats.max_logit).exp())


@documented
@dataclass(frozen=True, kw_only=True)
class MinK(_Rule):
    """Min-k: keeps the k largest logits, k the steepest step of the sorted row.

    With `l_1 ≥ … ≥ l_V` and `R = l_1 − l_V`: `k = argmax_i (l_i − l_{i+1}) / (R · i)`, the first if
    several are, but at least `⌊τ / R⌋` (flat rows have no step). R is that of the logits before T.
    Ding et al. 2026, arXiv:2604.11012, whose τ is 3. Equal logits stay or go together.
    """

    kind = "min_k"
    tau: float = option("τ, logits: keeps at least ⌊τ / R⌋ tokens", 3.0, must_be="≥ 0")

    def cut(self, scaled: torch.Tensor | None) -> Cut:
        V = scaled.shape[1]
        rest = scaled if _is_whole(scaled) else scaled.masked_fill(scaled == -torch.inf, torch.inf)
        lowest = rest.amin(1)
        extent = scaled.amax(1) - lowest  # −inf where everything is masked
        k = _steepest(scaled, lowest)
        flat = (self.tau / (extent * self._divisor())).clamp(0, V).nan_to_num(nan=0.0)
        return Cut(min_p=self.min_p, top_k=k.maximum(flat.floor().long()))

    def _divisor(self) -> float:
        """What logits were divided by: T in its range."""
        return float(divisor(self._in_range(torch.tensor(self.temperature))))

    def times(self, factor: float) -> "MinK":
        return replace(self, temperature=self._divisor() * factor, scale=1.0, t_min=0.0, t_max=None)


def _steepest(z: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
    """The steepest step of sorted rows, `[B]` int64, from 1; the logits `lowest [B]` are the last.

    On a CPU a row is sorted only if a step beyond its HEAD largest logits might be steeper than the
    steepest among them: it is at most (l_HEAD − l_V) / HEAD.
    """
    V = z.shape[1]
    if z.is_cpu and V > HEAD:
        head = z.topk(HEAD, 1).values
        steepness, k = _steps(head).max(1)
        beyond = (head[:, -1] - lowest) / HEAD
        unsure = (steepness <= beyond).nonzero()[:, 0]
        if len(unsure):
            k[unsure] = _steps(z[unsure].sort(1, descending=True).values).argmax(1)
        return k + 1
    if V == 1:
        return torch.ones(z.shape[0], dtype=torch.int64, device=z.device)
    return _steps(z.sort(1, descending=True).values).argmax(1) + 1


def _steps(largest: torch.Tensor) -> torch.Tensor:
    """`(l_i − l_{i+1}) / i`, `[B, K]` → `[B, K − 1]`; none leads to a masked token."""
    upper, lower = largest[:, :-1], largest[:, 1:]
    i = torch.arange(1, largest.shape[1], device=largest.device)
    return torch.where(lower == -torch.inf, 0.0, upper - lower) / i
