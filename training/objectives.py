"""What a head is trained for: an objective makes sums of losses over the tokens of a batch.

Called with a batch, the LM head and the head; means come later, over a step.

    MinPHinge              the required temperature, softly; see `min_p_hinge_loss`
    LabelFree              the width of the model's own nucleus; see `nucleus_width_loss`
    AutoDecoTemperature    AutoDeco's temperature loss
    AutoDecoTopP           its soft top-p loss for a second head; the first one stays as it is
    AutoDecoJoint          both losses for both heads
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from autodeco_fast import (
    TokenStats,
    autodeco_temperature_loss,
    goldilocks_weight,
    logit_stats,
    min_p_hinge_loss,
    nucleus_width_loss,
    required_temperature,
    token_stats,
)
from autodeco_fast.lm_head import multiply, rows_of_chunk
from autodeco_fast.losses.autodeco import learned_by_autodeco
from autodeco_fast.ops.soft_top_p import soft_top_p_rows
from autodeco_fast.stats import IGNORED

# Of the logits that the joint objective makes at a time; fewer rows make a slow product.
CHUNK_BYTES = 64 << 20


class Batch(NamedTuple):
    """Some tokens to learn from."""

    hidden: torch.Tensor  # [N, H] what enters the output embedding, without a graph
    target: torch.Tensor  # [N] int64 ids, −100 where there is none
    uniform: torch.Tensor | None = None  # [N] in [0, 1), what is left out; None draws with torch
    stats: TokenStats | None = None  # [N] of the model's logits, where they are known
    # [N] tokens of the text that each stands for, where others like it were left out already, by
    # the same uniforms; None: all are here
    weight: torch.Tensor | None = None
    # [N] λ of each token; None: that of the objective
    gravity: torch.Tensor | None = None


class Sums(NamedTuple):
    """Losses summed over some tokens, with what else is known of them."""

    # name → (sum with its graph, weight of the tokens in it: their number, or more)
    terms: dict[str, tuple[torch.Tensor, torch.Tensor]]
    temperature: torch.Tensor  # [N] predicted
    stats: TokenStats  # [N]
    weight: torch.Tensor  # [N] of the tokens in the first term, 0 elsewhere


class Objective(Protocol):
    """See the top of the file."""

    names: tuple[str, ...]  # of the terms

    def __call__(self, batch: Batch, lm_head, head: nn.Module) -> Sums:
        """`lm_head` is an `nn.Linear` or a `BaseModel`; None where statistics are all the objective
        looks at, and these are known."""
        ...


def transform_of(lm_head) -> dict:
    """bias, logit_scale and softcap of an `nn.Linear` or a `BaseModel`."""
    bias = getattr(lm_head, "bias", None)
    scale, softcap = getattr(lm_head, "logit_scale", 1.0), getattr(lm_head, "softcap", None)
    return {"bias": bias, "logit_scale": scale, "softcap": softcap}


def logits_in_chunks(
    hidden: torch.Tensor, lm_head, chunk_bytes: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of hidden states, and the LM head's product with them before scale and softcap; the next
    chunk overwrites it."""
    weight, bias = lm_head.weight.detach(), getattr(lm_head, "bias", None)
    chunk = rows_of_chunk(chunk_bytes, weight, len(hidden))
    buffer = weight.new_empty(chunk * len(weight))
    for start in range(0, len(hidden), chunk):
        index = slice(start, start + chunk)
        with torch.no_grad():
            logits = multiply(hidden[index].to(weight.dtype), weight, bias, buffer)
        yield index, logits


def joined(chunks: list[TokenStats]) -> TokenStats:
    """The statistics of all rows, from those of chunks of them."""
    return TokenStats(*(None if f[0] is None else torch.cat(f) for f in zip(*chunks)))


@dataclass(frozen=True)
class _Goldilocks:
    """Selection of tokens by the frozen model's own confidence; see `goldilocks_weight`."""

    max_rank: int = 100
    trivial_prob: float = 0.9
    easy_fraction: float = 0.1
    easy_weight: str = "inverse"

    def goldilocks(self, batch: Batch, stats: TokenStats) -> torch.Tensor:
        """What each token counts for, `[N]`."""
        weight = goldilocks_weight(
            stats,
            max_rank=self.max_rank,
            trivial_prob=self.trivial_prob,
            easy_fraction=self.easy_fraction,
            easy_weight=self.easy_weight,
            uniform=batch.uniform,
        )
        if self.easy_weight == "inverse" and batch.weight is not None:
            # Both selections look at the same uniform: the narrower one is a token's chance.
            weight = torch.where(weight > 0, torch.maximum(weight, batch.weight), weight)
        return weight


@dataclass(frozen=True, kw_only=True)
class MinPHinge(_Goldilocks):
    """The hinge between T and T*, weighted by `goldilocks_weight`."""

    names = ("hinge",)

    min_p: float = 0.1
    gravity: float = 0.1
    power: int = 1
    unreachable: str = "drop"

    def __call__(self, batch: Batch, lm_head, head: nn.Module) -> Sums:
        stats = batch.stats
        if stats is None:
            transform = transform_of(lm_head)
            stats = token_stats(batch.hidden, lm_head.weight, batch.target, **transform)
        weight = self.goldilocks(batch, stats)
        if self.unreachable == "drop":
            out_of_reach = required_temperature(stats, self.min_p) > head.max_temperature
            weight = weight * ~out_of_reach
        T = head(batch.hidden)
        loss = min_p_hinge_loss(
            T,
            stats,
            weight=weight,
            min_p=self.min_p,
            gravity=self.gravity,
            power=self.power,
            max_temperature=head.max_temperature,
            unreachable=self.unreachable,
            reduction="sum",
        )
        if batch.gravity is not None:
            loss = loss + (weight * (batch.gravity - self.gravity) * T).sum()
        terms = {"hinge": (loss, weight.sum())}
        return Sums(terms, temperature=T.detach(), stats=stats, weight=weight)


@dataclass(frozen=True)
class LabelFree:
    """The hinge's expectation over the model's own next tokens, at every token of the text.

    What the text has there is not learned from; statistics of it are for metrics.
    """

    names = ("nucleus_width",)

    min_p: float = 0.1
    gravity: float = 0.1
    unreachable: str = "drop"
    easy_weight: str = "inverse"
    chunk_bytes: int = CHUNK_BYTES

    def __call__(self, batch: Batch, lm_head, head: nn.Module) -> Sums:
        T, transform = head(batch.hidden), transform_of(lm_head)
        del transform["bias"]
        weight = (batch.target >= 0).to(T.dtype)
        if self.easy_weight == "inverse" and batch.weight is not None:
            weight = weight * batch.weight
        chunks, losses = [], [T.new_zeros(())]
        for index, logits in logits_in_chunks(batch.hidden, lm_head, self.chunk_bytes):
            if batch.stats is None:
                chunks.append(logit_stats(logits, batch.target[index], **transform))
            for gravity, rows in self._by_gravity(batch, index):
                loss = nucleus_width_loss(
                    T[index],
                    logits,
                    min_p=self.min_p,
                    gravity=gravity,
                    max_temperature=head.max_temperature,
                    unreachable=self.unreachable,
                    row_weight=weight[index] * rows,
                    reduction="sum",
                    **transform,
                )
                losses.append(loss)
        stats = batch.stats if batch.stats is not None else joined(chunks)
        terms = {"nucleus_width": (torch.stack(losses).sum(), weight.sum())}
        return Sums(terms, temperature=T.detach(), stats=stats, weight=weight)

    def _by_gravity(
        self, batch: Batch, index: slice
    ) -> Iterator[tuple[float, torch.Tensor | float]]:
        """Each λ, and 1 for the rows of a chunk that have it."""
        if batch.gravity is None:
            yield self.gravity, 1.0
            return
        for gravity in batch.gravity.unique().tolist():
            yield gravity, (batch.gravity[index] == gravity).float()


@dataclass(frozen=True, kw_only=True)
class AutoDecoTemperature(_Goldilocks):
    """AutoDeco's temperature loss on every token but the easy ones it leaves out at random."""

    names = ("temperature",)

    easy_drop: float = 0.6
    weighting: str | None = "unscaled"
    goldilocks_filter: bool = False  # selects in the place of easy_drop

    def __call__(self, batch: Batch, lm_head, head: nn.Module) -> Sums:
        T = head(batch.hidden)
        stats = token_stats(
            batch.hidden.to(lm_head.weight.dtype),
            lm_head.weight,
            batch.target,
            temperature=T,
            **transform_of(lm_head),
        )
        return self.sums_at(T, stats, batch)

    def sums_at(self, temperature: torch.Tensor, stats: TokenStats, batch: Batch) -> Sums:
        """The same where the statistics at the predicted temperature are known."""
        weight = self._weight(batch, stats)
        rows = autodeco_temperature_loss(
            temperature,
            stats._replace(rank=torch.where(weight > 0, stats.rank, -1)),
            easy_drop=0.0,
            weighting=self.weighting,
            reduction="none",
        )
        terms = {"temperature": ((rows * weight).sum(), weight.sum())}
        return Sums(terms, temperature=temperature.detach(), stats=stats, weight=weight)

    def _weight(self, batch: Batch, stats: TokenStats) -> torch.Tensor:
        if self.goldilocks_filter:
            return self.goldilocks(batch, stats)
        selected = learned_by_autodeco(stats, self.easy_drop, uniform=batch.uniform)
        return selected.to(stats.max_logit.dtype)


@dataclass(frozen=True, kw_only=True)
class AutoDecoTopP:
    """AutoDeco's soft top-p loss for the second of two heads, `nn.ModuleDict(temp_head=…,
    top_p_head=…)`, at every token."""

    names = ("soft_top_p",)

    steepness: float = 30.0
    chunk_bytes: int = CHUNK_BYTES

    def __call__(self, batch: Batch, lm_head, head: nn.ModuleDict) -> Sums:
        T = head["temp_head"](batch.hidden).detach()
        term, stats = self.term(batch, lm_head, temperature=T, head=head["top_p_head"])
        weight = (batch.target >= 0).to(T.dtype)
        return Sums({"soft_top_p": term}, temperature=T, stats=stats, weight=weight)

    def term(
        self,
        batch: Batch,
        lm_head,
        *,
        temperature: torch.Tensor,
        head: nn.Module,
        detach_temperature: bool = False,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], TokenStats]:
        """The summed loss and its number of tokens; statistics at the temperature.

        A chunk of logits serves the statistics, the top-p head's features and the sort.
        """
        transform = transform_of(lm_head)
        del transform["bias"]
        chunks, losses = [], [temperature.new_zeros(())]
        for index, logits in logits_in_chunks(batch.hidden, lm_head, self.chunk_bytes):
            h, y, T = batch.hidden[index], batch.target[index], temperature[index]
            chunks.append(logit_stats(logits, y, temperature=T, **transform))
            rows = soft_top_p_rows(
                logits,
                None,
                torch.where(y < 0, IGNORED, y),
                T.detach() if detach_temperature else T,
                head(h, T.detach(), head.features(logits, T, **transform)),
                bias=None,
                steepness=self.steepness,
                chunk_bytes=self.chunk_bytes,
                **transform,
            )
            losses.append(rows.sum())
        return (torch.stack(losses).sum(), (batch.target >= 0).sum()), joined(chunks)


@dataclass(frozen=True, kw_only=True)
class AutoDecoJoint(AutoDecoTemperature):
    """AutoDeco's two losses for two heads, `nn.ModuleDict(temp_head=…, top_p_head=…)`, from one
    product with the LM head."""

    names = ("temperature", "soft_top_p")

    steepness: float = 30.0
    detach_temperature: bool = False  # the soft top-p loss has no say in T
    chunk_bytes: int = CHUNK_BYTES

    def __call__(self, batch: Batch, lm_head, head: nn.ModuleDict) -> Sums:
        T = head["temp_head"](batch.hidden)
        top_p = AutoDecoTopP(steepness=self.steepness, chunk_bytes=self.chunk_bytes)
        term, stats = top_p.term(
            batch,
            lm_head,
            temperature=T,
            head=head["top_p_head"],
            detach_temperature=self.detach_temperature,
        )
        sums = self.sums_at(T, stats, batch)
        return sums._replace(terms={**sums.terms, "soft_top_p": term})
