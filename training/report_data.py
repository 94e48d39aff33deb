"""What the report shows, computed from a head and scans; nothing here draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.losses import difficulty
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.conformal import calibrate, coverage, scores
from autodeco_fast.training.measures import (
    compare,
    means,
    nucleus_widths,
    sample_of,
    sums_by_document,
)
from autodeco_fast.training.predictions import predict, required_temperatures
from autodeco_fast.training.scan_store import Scan, ScanTokens
from autodeco_fast.training.shading import BROKEN, token_texts

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
# Close together: comparisons are linear between neighbours, and the curve is not.
FIXED = tuple(round(0.1 * k, 1) for k in range(1, 21))
SHIFTS = (-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6)
BUCKETS = ("trivial", "middle", "impossible")
CLASSES = ("space", "word start", "inside a word", "number", "punctuation", "other")


@dataclass
class Domain:
    """A scan and what the head says of it; `[n]` arrays."""

    name: str
    tokens: ScanTokens
    example: np.ndarray  # its number, the same for all wishes
    raw: np.ndarray  # T̂ without the offset
    temperature: np.ndarray  # with it
    required: np.ndarray
    bucket: np.ndarray

    @property
    def document(self) -> np.ndarray:
        return self.tokens.document.numpy()


def domain(name: str, scan: Scan, head: TemperatureHead, *, min_p: float) -> Domain:
    tokens = scan.load()
    raw = predict(head, tokens)
    bucket = difficulty(tokens.stats(), max_rank=100, trivial_prob=0.9).numpy()
    T = np.clip(raw + head.offset, 0.0, head.max_temperature)
    return Domain(
        name=name,
        tokens=tokens,
        example=scan.example(tokens.document).numpy(),
        raw=raw,
        temperature=T,
        required=required_temperatures(tokens, min_p),
        bucket=bucket,
    )


@dataclass
class VCurve:
    """Predicted temperature against something that a temperature could follow."""

    # (mean of it, 20 %, mean, 80 % of T̂) in quantile bins of what is within reach; 0 is one
    points: list[tuple[float, float, float, float]]
    # rank correlation of the two, over all tokens; None where one of them does not vary
    spearman: float | None
    reachable: float  # share of the tokens


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where all of one tie."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[inverse]

    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else None


def v_curve(x: np.ndarray, temperature: np.ndarray, limit: float, bins: int = 24) -> VCurve:
    """T̂ against `x`, a temperature, of some tokens; `limit` is the head's highest."""
    order = np.argsort(x, kind="stable")
    order = order[x[order] <= limit]
    zero = int((x[order] == 0).sum())
    groups = [order[:zero], *np.array_split(order[zero:], bins)]
    points = []
    for group in (group for group in groups if len(group)):
        T = temperature[group]
        low, high = np.quantile(T, 0.2), np.quantile(T, 0.8)
        points.append((float(x[group].mean()), float(low), float(T.mean()), float(high)))
    return VCurve(points, spearman(x, temperature), len(order) / len(x))


def v_curves(
    d: Domain, base: BaseModel, *, mass: float, min_p: float, limit: float
) -> tuple[VCurve, VCurve]:
    """T̂ against T*, and on a sample of the tokens against the width of the model's own nucleus of
    this mass."""
    picks = sample_of(d.tokens)
    widths = nucleus_widths(d.tokens[picks], base, mass=mass, min_p=min_p)
    of_nucleus = v_curve(widths.numpy(), d.temperature[picks.numpy()], limit)
    return v_curve(d.required, d.temperature, limit), of_nucleus


def reliability(
    ours: Domain, others: Sequence[Domain], limit: float
) -> dict[str, list[tuple[float, float]]]:
    """(1 − α, measured coverage): calibrated on every second example of the first, measured on its
    rest and on the others."""
    half = np.isin(ours.example, np.unique(ours.example)[::2])
    s = scores(ours.required, ours.raw, limit)
    curves: dict[str, list[tuple[float, float]]] = {d.name: [] for d in (ours, *others)}
    if half.all():
        return curves  # one document: nothing is left to measure on
    for alpha in ALPHAS:
        try:
            found = calibrate(
                s[half], ours.example[half], alpha=alpha, max_temperature=limit, samples=2
            )
        except ValueError:  # out of reach
            continue
        measured = {ours.name: (ours.required[~half], ours.raw[~half])}
        measured |= {d.name: (d.required, d.raw) for d in others}
        for name, (required, predicted) in measured.items():
            covered = coverage(required, predicted, offset=found.offset, max_temperature=limit)
            curves[name].append((1 - alpha, covered))
    return curves


@dataclass
class Costs:
    """What coverage costs, on a sample of a domain's tokens."""

    measures: dict[str, dict[str, float]]  # policy → the four measures
    # axis → coverage of the head minus that of the best fixed temperature, with its 95 % interval
    comparisons: dict[str, tuple[float, float, float]]


def costs(d: Domain, base: BaseModel, head: TemperatureHead, *, min_p: float) -> Costs:
    """Fixed temperatures, the head at several shifts, and the oracle; intervals resample
    examples."""
    picks = sample_of(d.tokens)
    T, limit = torch.from_numpy(d.temperature)[picks], head.max_temperature
    policies: dict[str, torch.Tensor | None] = {
        f"fixed {t:g}": torch.full_like(T, t) for t in FIXED
    }
    policies |= {f"head {shift:+g}": (T + shift).clamp(0.0, limit) for shift in SHIFTS}
    policies["oracle"] = None
    some = replace(d.tokens[picks], document=torch.from_numpy(d.example)[picks])
    sums = sums_by_document(some, base, policies, min_p=min_p, max_temperature=limit)
    fixed = [sums[f"fixed {t:g}"] for t in FIXED]
    comparisons = {
        label: compare(sums["head +0"], fixed, axis, seed=0)
        for axis, label in ((1, "mean temperature"), (2, "kept-set size"))
    }
    return Costs({name: means(value) for name, value in sums.items()}, comparisons)


def target_texts(tokenizer, tokens: ScanTokens) -> list[str]:
    """The text of every target, read in its document."""
    target, document = tokens.target.numpy(), tokens.document.numpy()
    order = np.argsort(document, kind="stable")
    texts = np.empty(len(target), dtype=object)
    for index in np.split(order, np.flatnonzero(np.diff(document[order])) + 1):
        texts[index] = _behind_another(tokenizer, target[index].tolist())
    return texts.tolist()


def _behind_another(tokenizer, ids: list[int]) -> list[str]:
    """The texts of tokens the first of which stands behind another: a document's first token is no
    target."""
    lead = ids[:1]
    if BROKEN in tokenizer.decode(lead):
        return token_texts(tokenizer, ids)
    return token_texts(tokenizer, [*lead, *ids])[len(lead) :]


def classes_of(texts: Sequence[str]) -> np.ndarray:
    """The class of every token's text, an index into CLASSES. A token without one is part of the
    character that a later token ends, and of its class."""

    def one(text: str) -> int:
        bare = text.strip()
        if not bare:
            return 0
        if bare.isdigit():
            return 3
        if bare.isidentifier():
            return 1 if text != text.lstrip() else 2
        return 4 if not any(c.isalnum() for c in bare) else 5

    classes: list[int] = []
    for text in reversed(texts):
        classes.append(classes[-1] if classes and not text else one(text))
    return np.array(classes[::-1])


def passages(d: Domain, tokenizer, *, count: int, length: int) -> list[list[tuple[str, float]]]:
    """(text, T̂) of the first targets of some documents."""
    found = []
    documents = np.unique(d.document)
    for name in documents[:: max(1, len(documents) // count)][:count]:
        index = np.flatnonzero(d.document == name)[:length]
        texts = _behind_another(tokenizer, d.tokens.target[index].tolist())
        found.append(list(zip(texts, d.temperature[index].tolist())))
    return found
