"""What a head is trained for. An objective makes sums of losses over the tokens of a batch; means
come later, over a step.

    MinPHinge              the required temperature, softly (λ-quantile, see `min_p_hinge_loss`)
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
from autodeco_fast.lm_head import multiply
from autodeco_fast.losses.autodeco import learned_by_autodeco
from autodeco_fast.ops.soft_top_p import soft_top_p_rows
from autodeco_fast.stats import IGNORED

# Of the logits that the joint objective makes at a time; fewer rows make a slow product.
CHUNK_BYTES = 64 << 20


class Batch(NamedTuple):
    """Tokens that a process takes at once: data, whatever the objective."""

    hidden: torch.Tensor  # [N, H] what enters the output embedding
    target: torch.Tensor  # [N] int64, −100 where there is none
    uniform: torch.Tensor | None = None  # [N] in [0, 1): what is left out; by torch if None
    stats: TokenStats | None = None  # of the logits, where they are known


class Sums(NamedTuple):
    """Losses summed over some tokens, with what else is known of them."""

    terms: dict[str, tuple[torch.Tensor, torch.Tensor]]  # (sum with its graph, tokens in it)
    temperature: torch.Tensor  # [N] predicted
    stats: TokenStats  # [N]
    learned: torch.Tensor  # bool [N]: the tokens in the first term


def transform_of(lm_head) -> dict:
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

    def __call__(self, batch: Batch, lm_head, head: nn.Module) -> Sums:
        stats = batch.stats
        if stats is None:
            options = transform_of(lm_head)
            stats = token_stats(batch.hidden, lm_head.weight, batch.target, **options)
        selected = goldilocks_mask(
            stats,
            max_rank=self.max_rank,
            trivial_prob=self.trivial_prob,
            easy_fraction=self.easy_fraction,
            uniform=batch.uniform,
        )
        T, limit = head(batch.hidden), head.max_temperature
        loss = min_p_hinge_loss(
            T,
            stats._replace(rank=torch.where(selected, stats.rank, -1)),
            min_p=self.min_p,
            gravity=self.gravity,
            power=self.power,
            max_temperature=limit,
            unreachable=self.unreachable,
            reduction="sum",
        )
        if self.unreachable == "drop":
            selected = selected & (required_temperature(stats, self.min_p) <= limit)
        return Sums({"hinge": (loss, selected.sum())}, T.detach(), stats, selected)


@dataclass(frozen=True)
class AutoDecoTemperature:
    """AutoDeco's temperature loss on every token but the easy ones it leaves out at random."""

    names = ("temperature",)

    easy_drop: float = 0.6
    weighting: str | None = "unscaled"

    def __call__(self, batch: Batch, lm_head, head: nn.Module) -> Sums:
        T, options = head(batch.hidden), transform_of(lm_head)
        stats = token_stats(batch.hidden, lm_head.weight, batch.target, temperature=T, **options)
        return self.at(T, stats, batch.uniform)

    def at(self, T: torch.Tensor, stats: TokenStats, uniform: torch.Tensor | None) -> Sums:
        """The same where the statistics at T are known."""
        learned = learned_by_autodeco(stats, self.easy_drop, uniform=uniform)
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

    def __call__(self, batch: Batch, lm_head, head: nn.ModuleDict) -> Sums:
        hidden, weight, transform = batch.hidden, lm_head.weight.detach(), transform_of(lm_head)
        bias = transform.pop("bias")
        T = head["temp_head"](hidden)
        chunk = max(1, self.chunk_bytes // (len(weight) * hidden.element_size()))
        buffer = hidden.new_empty(min(chunk, len(hidden)) * len(weight))
        stats, losses = [], []
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.no_grad():
                logits = multiply(hidden[rows], weight, bias, buffer)
            stats.append(logit_stats(logits, batch.target[rows], temperature=T[rows], **transform))
            loss = self._soft_top_p(
                logits, hidden[rows], batch.target[rows], T[rows], head["top_p_head"], transform
            )
            losses.append(loss)
        whole = TokenStats(*(None if f[0] is None else torch.cat(f) for f in zip(*stats)))
        first = AutoDecoTemperature(self.easy_drop, self.weighting).at(T, whole, batch.uniform)
        soft = torch.stack(losses).sum(), (batch.target >= 0).sum()
        return first._replace(terms={**first.terms, "soft_top_p": soft})

    def _soft_top_p(
        self, logits: torch.Tensor, hidden, target, T: torch.Tensor, top_p_head, transform: dict
    ) -> torch.Tensor:
        """The sum of the soft top-p losses of a chunk of logits."""
        features = None
        if top_p_head.use_enhanced_features:
            features = prob_stats(logits, T.detach(), **transform)
        top_p = top_p_head(hidden, T.detach(), features)
        return soft_top_p_rows(
            logits,
            None,
            torch.where(target < 0, IGNORED, target),
            T,
            top_p,
            bias=None,
            steepness=self.steepness,
            chunk_bytes=self.chunk_bytes,
            **transform,
        ).sum()
