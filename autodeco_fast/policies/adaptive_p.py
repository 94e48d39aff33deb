"""Adaptive-p: tokens whose probability is near a target, on average."""

import math
from dataclasses import dataclass

import torch

from autodeco_fast.options import documented, option
from autodeco_fast.policies.base import Cut, Policy
from autodeco_fast.values import require

WIDTH, PEAK, SHARPNESS = 0.3, 5.0, 10.0  # llama.cpp's


@documented
@dataclass(frozen=True, kw_only=True)
class AdaptiveP(Policy):
    """Draws from `softmax(5 − 10 d² / (1 + d))`, `d = |p − a| / 0.3`, p = softmax(z/T) cut at
    Min-P: tokens of about probability a.

    `a = clip(2 · target − m, 0, 1)` steers the running mean m of the drawn tokens' p back to the
    target: `m ← decay · m + (1 − decay) · p`, from m = target. Every sequence has a mean of its
    own, which begins with a call of `generate`. Far from a the weights level off, so it needs a
    Min-P cut in front: without one the tail of the vocabulary is drawn.

    The adaptive-p sampler of llama.cpp, ggml-org/llama.cpp#17927 (MrJackSpade/adaptive-p-docs).
    """

    kind = "adaptive_p"
    cuts_by_row = True
    remembers = True
    target: float = option("mean probability to draw at", 0.5, must_be="in [0, 1]")
    decay: float = option("of the running mean, a token", 0.9, must_be="in [0, 1)")
    temperature: float = option("T", 1.0, must_be="positive")
    min_p: float = option("Min-P cut at T, before the rest", 0.05, must_be="in [0, 1]")

    def __post_init__(self):
        super().__post_init__()
        require(self.min_p > 0, "min_p", self.min_p, "in (0, 1] with adaptive_p")

    def rule(self, hidden: torch.Tensor, logits: torch.Tensor | None) -> float:
        return self.temperature

    def cut(self, scaled: torch.Tensor | None) -> Cut:
        return self.started().cut(scaled)

    def started(self) -> "_Started":
        return _Started(self)


class _Started:
    """Adaptive-p in one call, with the means of its rows."""

    def __init__(self, policy: AdaptiveP):
        self.policy = policy
        self.mean: torch.Tensor | float = policy.target  # or [B] fp32
        self._p: torch.Tensor | None = None  # [B, V], of the last cut

    def cut(self, scaled: torch.Tensor) -> Cut:
        policy = self.policy
        top = scaled.amax(1, keepdim=True)
        left = scaled.masked_fill(scaled < top + math.log(policy.min_p), -torch.inf)
        self._p = p = left.softmax(1)
        aim = torch.as_tensor(2 * policy.target - self.mean, device=p.device).clamp(0, 1)
        d = (p - aim.reshape(-1, 1)).abs_().div_(WIDTH)
        weight = (d * d).div_(d.add_(1)).mul_(-SHARPNESS).add_(PEAK)
        return Cut(logits=weight.masked_fill_(left == -torch.inf, -torch.inf))

    def drawn(self, token: torch.Tensor) -> None:
        """Tokens `[B]` drawn under the last cut enter the means."""
        p, decay = self._p.gather(1, token[:, None])[:, 0], self.policy.decay
        self.mean = decay * self.mean + (1 - decay) * p
