"""What the report shows, computed from a head and scans; nothing here draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.losses import difficulty
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.calibrate import predict, required
from autodeco_fast.training.conformal import calibrate, coverage, scores
from autodeco_fast.training.policy_means import policy_means, sample
from autodeco_fast.training.scan_store import Scan, ScanTokens

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
FIXED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0)
SHIFTS = (-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6)
BUCKETS = ("trivial", "middle", "impossible")
CLASSES = ("space", "word start", "inside a word", "number", "punctuation", "other")


@dataclass
class Domain:
    """A scan and what the head says of it; `[n]` arrays."""

    name: str
    tokens: ScanTokens
    raw: np.ndarray  # T̂ without the offset
    temperature: np.ndarray  # with it
    required: np.ndarray
    bucket: np.ndarray

    @property
    def document(self) -> np.ndarray:
        return self.tokens.document.numpy()


def domain(name: str, scan: Scan, head: TemperatureHead, min_p: float) -> Domain:
    tokens = scan.load()
    raw = predict(head, tokens)
    bucket = difficulty(tokens.stats(), max_rank=100, trivial_prob=0.9).numpy()
    T = np.clip(raw + head.offset, 0.0, head.max_temperature)
    return Domain(name, tokens, raw, T, required(tokens, min_p), bucket)


def v_curve(
    d: Domain, min_p: float, limit: float, bins: int = 24
) -> list[tuple[float, float, float, float]]:
    """(mean gap, 20 %, mean, 80 % of T̂) in quantile bins of the gap, T* within reach; tokens with
    gap 0 are the first bin."""
    order = np.argsort(d.required, kind="stable")
    order = order[d.required[order] <= limit]
    zero = int((d.required[order] == 0).sum())
    parts = [order[:zero], *np.array_split(order[zero:], bins)]
    width = -math.log(min_p)
    return [
        (float(d.required[i].mean() * width), *np.quantile(d.temperature[i], 0.2, keepdims=True).tolist(),
         float(d.temperature[i].mean()), float(np.quantile(d.temperature[i], 0.8)))
        for i in parts
        if len(i)
    ]  # fmt: skip


def reliability(
    ours: Domain, others: Sequence[Domain], limit: float
) -> dict[str, list[tuple[float, float]]]:
    """(1 − α, measured coverage): calibrated on every second document of the first, measured on its
    rest and on the others."""
    half = np.isin(ours.document, np.unique(ours.document)[::2])
    s = scores(ours.required, ours.raw, limit)
    curves: dict[str, list[tuple[float, float]]] = {d.name: [] for d in (ours, *others)}
    for alpha in ALPHAS:
        try:
            offset = calibrate(s[half], ours.document[half], alpha, limit, draws=2).offset
        except ValueError:  # out of reach
            continue
        curves[ours.name].append(
            (1 - alpha, coverage(ours.required[~half], ours.raw[~half], offset, limit))
        )
        for d in others:
            curves[d.name].append((1 - alpha, coverage(d.required, d.raw, offset, limit)))
    return curves


def costs(
    d: Domain, base: BaseModel, head: TemperatureHead, min_p: float
) -> dict[str, dict[str, float]]:
    """Coverage, temperature, kept-set size and nll of fixed temperatures, the head at several
    shifts, and the oracle."""
    picks = sample(d.tokens)
    T = torch.from_numpy(d.temperature)[picks]
    limit = head.max_temperature
    policies = {f"fixed {t:g}": torch.full_like(T, t) for t in FIXED}
    policies |= {f"head {shift:+g}": (T + shift).clamp(0.0, limit) for shift in SHIFTS}
    policies["oracle"] = torch.from_numpy(d.required)[picks].clamp(max=limit)
    return policy_means(d.tokens.rows(picks), base, policies, min_p)


def classes_of(pieces: Sequence[str]) -> np.ndarray:
    """The class of every token's text, an index into CLASSES."""

    def one(text: str) -> int:
        bare = text.strip()
        if not bare:
            return 0
        if bare.isdigit():
            return 3
        if bare.isidentifier():
            return 1 if text != text.lstrip() else 2
        return 4 if not any(c.isalnum() for c in bare) else 5

    return np.array([one(piece) for piece in pieces])


def passages(d: Domain, tokenizer, count: int, length: int) -> list[list[tuple[str, float]]]:
    """(text, T̂) of the first targets of some documents."""
    found = []
    documents = np.unique(d.document)
    for name in documents[:: max(1, len(documents) // count)][:count]:
        rows = np.flatnonzero(d.document == name)[:length]
        pieces = tokenizer.batch_decode([[int(i)] for i in d.tokens.target[rows]])
        found.append(list(zip(pieces, d.temperature[rows].tolist())))
    return found
