"""What a head is trained for. An objective makes sums of losses over tokens from hidden states;
means come later, over a step.

Called with hidden states, targets, the LM head, the head, and `draw [N]`, uniform in [0, 1), which
decides what is left out at random (None draws with torch).

    MinPHinge              the required temperature, softly                 (λ-quantile, see `min_p_hinge_loss`)
    AutoDecoTemperature    AutoDeco's temperature loss
    AutoDecoJoint          the same plus its soft top-p loss for a second head
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from autodeco_fast import (
    TokenStats,
    autodeco_temperature_loss,
    goldilocks_mask,
    logit_stats,
    min_p_hinge_loss,
    prob_stats,
    required_temperature,
    token_stats,
)
from autodeco_fast.losses.autodeco import learned_by_autodeco
from autodeco_fast.ops.soft_top_p import soft_top_p_rows
from autodeco_fast.lm_head import multiply

CHUNK_BYTES = (
    64 << 20
)  # of the logits that the joint objective makes at a time; fewer rows make a slow product


class Sums(NamedTuple):
    """Losses summed over some tokens, with what else is known of them."""

    terms: dict[
        str, tuple[torch.Tensor, torch.Tensor]
    ]  # name → (sum with its graph, number of tokens in it)
    temperature: torch.Tensor  # [N] predicted
    stats: TokenStats  # [N]
    learned: torch.Tensor  # bool [N]: the tokens in the first term


def head_options(lm_head) -> dict:
    """bias, logit_scale and softcap of an `nn.Linear` or a `BaseModel`."""
    bias = getattr(lm_head, "bias", None)
    scale, softcap = getattr(lm_head, "logit_scale", 1.0), getattr(lm_head, "softcap", None)
    return {"bias": bias, "logit_scale": scale, "softcap": softcap}


@dataclass(frozen=True)
class MinPHinge:
    """The hinge between T and T*, on the tokens that `goldilocks_mask` selects."""

    names = ("hinge",)

    min_p: float = 0.1
    gravity: float = 0.1
    power: int = 1
    unreachable: str = "drop"
    max_rank: int = 100
    trivial_prob: float = 0.9
    easy_fraction: float = 0.1

    def __call__(self, hidden, target, lm_head, head: nn.Module, draw: torch.Tensor | None) -> Sums:
        stats = token_stats(hidden, lm_head.weight, target, **head_options(lm_head))
        return self.from_stats(hidden, stats, head, draw)

    def from_stats(
        self, hidden, stats: TokenStats, head: nn.Module, draw: torch.Tensor | None
    ) -> Sums:
        """The same where the statistics are known."""
        selected = goldilocks_mask(
            stats,
            max_rank=self.max_rank,
            trivial_prob=self.trivial_prob,
            easy_fraction=self.easy_fraction,
            draw=draw,
        )
        T, limit = head(hidden), head.max_temperature
        options = {
            "min_p": self.min_p,
            "gravity": self.gravity,
            "power": self.power,
            "max_temperature": limit,
        }
        chosen = stats._replace(rank=torch.where(selected, stats.rank, -1))
        loss = min_p_hinge_loss(T, chosen, **options, unreachable=self.unreachable, reduction="sum")
        if self.unreachable == "drop":
            selected = selected & (required_temperature(stats, self.min_p) <= limit)
        return Sums({"hinge": (loss, selected.sum())}, T.detach(), stats, selected)


@dataclass(frozen=True)
class AutoDecoTemperature:
    """AutoDeco's temperature loss on every token but the easy ones it leaves out at random."""

    names = ("temperature",)

    easy_drop: float = 0.6
    weighting: str | None = "unscaled"

    def __call__(self, hidden, target, lm_head, head: nn.Module, draw: torch.Tensor | None) -> Sums:
        T = head(hidden)
        stats = token_stats(hidden, lm_head.weight, target, temperature=T, **head_options(lm_head))
        return self.from_stats(T, stats, draw)

    def from_stats(self, T: torch.Tensor, stats: TokenStats, draw: torch.Tensor | None) -> Sums:
        """The same where the statistics at T are known."""
        learned = learned_by_autodeco(stats, self.easy_drop, draw=draw)
        chosen = stats._replace(rank=torch.where(learned, stats.rank, -1))
        loss = autodeco_temperature_loss(
            T, chosen, easy_drop=0.0, weighting=self.weighting, reduction="sum"
        )
        return Sums({"temperature": (loss, learned.sum())}, T.detach(), stats, learned)


@dataclass(frozen=True)
class AutoDecoJoint:
    """AutoDeco's two losses for two heads, `nn.ModuleDict(temp_head=…, top_p_head=…)`, from one
    product with the LM head.

    A chunk of logits serves the statistics, the top-p head's features and the sort.
    """

    names = ("temperature", "soft_top_p")

    easy_drop: float = 0.6
    weighting: str | None = "unscaled"
    steepness: float = 30.0
    chunk_bytes: int = CHUNK_BYTES

    def __call__(
        self, hidden, target, lm_head, head: nn.ModuleDict, draw: torch.Tensor | None
    ) -> Sums:
        weight, options = lm_head.weight.detach(), head_options(lm_head)
        bias, transform = options.pop("bias"), options
        T = head["temp_head"](hidden)
        chunk = max(1, self.chunk_bytes // (len(weight) * hidden.element_size()))
        block = hidden.new_empty(min(chunk, len(hidden)) * len(weight))
        parts, losses = [], []
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, heat, y = hidden[rows], T[rows], target[rows]
            with torch.no_grad():
                logits = multiply(h, weight, bias, block)
            parts.append(logit_stats(logits, y, temperature=heat, **transform))
            enhanced = head["top_p_head"].use_enhanced_features
            features = prob_stats(logits, heat.detach(), **transform) if enhanced else None
            top_p = head["top_p_head"](h, heat.detach(), features)
            column = torch.where(y < 0, -2, y)
            soft = {
                "bias": None,
                "steepness": self.steepness,
                "chunk_bytes": self.chunk_bytes,
                **transform,
            }
            losses.append(soft_top_p_rows(logits, None, column, heat, top_p, **soft).sum())
        stats = TokenStats(*(None if f[0] is None else torch.cat(f) for f in zip(*parts)))
        first = AutoDecoTemperature(self.easy_drop, self.weighting).from_stats(T, stats, draw)
        soft = torch.stack(losses).sum(), (target >= 0).sum()
        return first._replace(terms={**first.terms, "soft_top_p": soft})
