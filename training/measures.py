"""Measures of policies on reference text: coverage, mean T, kept-set size and nats, per document.

Over tokens with logits z, reference y, required temperature T* and temperature T:

    covered      T ≥ T* = (z_max − z_y) / (−ln p_min)
    kept set     {i: z_i ≥ z_max + T·ln p_min}
    nats         −ln softmax(z/T)_y

T* is the scan's; logits are made again from its hidden states.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.head_on_scan import (
    min_p_of,
    predict,
    required_temperatures,
    scanned_model,
)
from autodeco_fast.training.scan_store import Scan, ScanTokens

MEASURES = ("coverage", "temperature", "kept_set_size", "nats")
_CHUNK = 1 << 20  # logits that are held at a time: they stay in a cache
_SAMPLED = 1 << 26  # logits of a sample of tokens
_FEWEST = 4096  # tokens of a sample, however large the vocabulary


def sample(tokens: ScanTokens, vocabulary: int) -> torch.Tensor:
    """Indices of as many tokens as can be measured in seconds, always the same."""
    count = max(_FEWEST, _SAMPLED // vocabulary)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    return order[:count].sort().values


@torch.inference_mode()
def measure(
    tokens: ScanTokens, base: BaseModel, policies: dict[str, torch.Tensor], *, min_p: float
) -> dict[str, torch.Tensor]:
    """Sums of the four measures by document, from one pass over the logits.

    Args:
        policies: name → `[N]` temperatures, fp32.

    Returns:
        name → `[documents, 5]` fp64: the four measures and the number of tokens.
    """
    _, document = torch.unique(tokens.document, return_inverse=True)
    documents = int(document.max()) + 1
    required = torch.from_numpy(required_temperatures(tokens, min_p))
    sums = {name: torch.zeros(documents, 5, dtype=torch.float64) for name in policies}
    chunk = max(1, _CHUNK // base.vocabulary)
    for at in range(0, len(tokens), chunk):
        index = slice(at, at + chunk)
        z = base.logits(tokens.hidden[index])
        z_y = z.gather(1, tokens.target[index, None].long())[:, 0]
        top = z.amax(-1)
        z, z_y = z.sub_(top[:, None]), z_y - top
        for name, temperature in policies.items():
            T = temperature[index]
            covered = required[index] <= T
            columns = [covered, T, *_cost(z, z_y, T, min_p), torch.ones_like(T)]
            sums[name].index_add_(0, document[index], torch.stack([c.double() for c in columns], 1))
    return sums


def _cost(
    z: torch.Tensor, z_y: torch.Tensor, temperature: torch.Tensor, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept-set size and nats, `[n]`, from logits `[n, V]` less their maxima."""
    inverse = 1 / temperature.clamp(min=1e-3)
    scaled = z * inverse[:, None]
    # Comparisons into floats: sums of bools are slow.
    kept = torch.ge(scaled, math.log(min_p), out=torch.empty_like(scaled))
    return kept.sum(-1), scaled.exp_().sum(-1).log() - z_y * inverse


def means(sums: torch.Tensor) -> dict[str, float]:
    """The four measures over all tokens of `[documents, 5]` sums."""
    total = sums.sum(0)
    return dict(zip(MEASURES, (total[:4] / total[4]).tolist()))


def at_equal(fixed: torch.Tensor, axis: int, value: torch.Tensor) -> torch.Tensor:
    """Coverage on the curve of fixed temperatures where measure `axis` equals `value`.

    Linear between its points.

    Args:
        fixed: `[samples, temperatures, 4]` measures, growing along `axis`.
        value: `[samples]`; values outside the curve take its end.
    """
    x, y = fixed[:, :, axis].contiguous(), fixed[:, :, 0]
    right = torch.searchsorted(x, value[:, None].contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, right - 1)[:, 0], x.gather(1, right)[:, 0]
    y0, y1 = y.gather(1, right - 1)[:, 0], y.gather(1, right)[:, 0]
    share = ((value - x0) / (x1 - x0)).nan_to_num(0.0).clamp(0, 1)  # equal points: either
    return y0 + share * (y1 - y0)


@dataclass(frozen=True)
class Comparison:
    """Coverage of a policy less that of the best fixed temperature where one measure is equal."""

    equal: str  # the measure, in words
    difference: float
    low: float  # of a 95 % interval: documents are resampled; one document says nothing
    high: float


def compare(
    policy: torch.Tensor, fixed: Sequence[torch.Tensor], equal: str, samples: int = 1000
) -> Comparison:
    """A policy against fixed temperatures at equal "temperature" or "kept_set_size".

    Args:
        policy: `[documents, 5]` sums.
        fixed: the same of every fixed temperature, rising.
        samples: of the bootstrap; documents are drawn with replacement.
    """
    documents, axis = len(policy), MEASURES.index(equal)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(documents, (samples, documents), generator=generator)
    picks = torch.cat([torch.arange(documents)[None], picks])  # the first is all of them, once
    counts = torch.zeros(samples + 1, documents, dtype=torch.float64)
    counts.scatter_add_(1, picks, torch.ones_like(picks).double())
    totals = [counts @ sums for sums in (policy, *fixed)]
    ours, *others = [total[:, :4] / total[:, 4:] for total in totals]
    difference = ours[:, 0] - at_equal(torch.stack(others, 1), axis, ours[:, axis])
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = difference[1:].quantile(levels).tolist() if documents > 1 else (-1.0, 1.0)
    words = {"temperature": "mean temperature", "kept_set_size": "kept-set size"}
    return Comparison(equal=words[equal], difference=difference[0].item(), low=low, high=high)


def of_heads(scan: Scan, heads: list[TemperatureHead]) -> list[dict[str, float]]:
    """The measures of heads, each at its Min-P, and the kept-set size of the oracle T*.

    Raises:
        ValueError: if the scanned model is not there any more.
    """
    base, tokens = scanned_model(scan), scan.load()
    tokens = tokens.rows(sample(tokens, base.vocabulary))
    found = []
    for head in heads:
        min_p = min_p_of(head)
        required = torch.from_numpy(required_temperatures(tokens, min_p))
        policies = {
            "head": torch.from_numpy(predict(head, tokens)),
            "oracle": required.clamp(max=head.max_temperature),
        }
        sums = measure(tokens, base, policies, min_p=min_p)
        oracle = means(sums["oracle"])["kept_set_size"]
        found.append({**means(sums["head"]), "oracle_kept_set_size": oracle})
    return found
