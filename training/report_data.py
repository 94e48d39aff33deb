"""What the report shows, computed from a head and scans; nothing here draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.losses import difficulty
from autodeco_fast.training import measures
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.conformal import calibrate, coverage, scores
from autodeco_fast.training.head_on_scan import predict, required_temperatures
from autodeco_fast.training.measures import Comparison
from autodeco_fast.training.scan_store import Scan, ScanTokens

ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
FIXED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
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


@dataclass(frozen=True)
class Passage:
    """Text with the head's temperature for every token, after a prompt if it continues one."""

    tokens: list[tuple[str, float]]
    prompt: str = ""
    title: str = ""


@dataclass
class Costs:
    """The measures of policies, each name → value, and the head against fixed temperatures."""

    fixed: dict[float, dict[str, float]]  # by temperature
    shifted: dict[float, dict[str, float]]  # the head, by what is added to its temperatures
    oracle: dict[str, float]  # T*, or T_max where it is out of reach
    comparisons: list[Comparison]


def domain(name: str, scan: Scan, head: TemperatureHead, *, min_p: float) -> Domain:
    tokens = scan.load()
    raw = predict(head, tokens)
    return Domain(
        name=name,
        tokens=tokens,
        raw=raw,
        temperature=np.clip(raw + head.offset, 0.0, head.max_temperature),
        required=required_temperatures(tokens, min_p),
        bucket=difficulty(tokens.stats(), max_rank=100, trivial_prob=0.9).numpy(),
    )


def v_curve(
    d: Domain, min_p: float, limit: float, bins: int = 24
) -> list[tuple[float, float, float, float]]:
    """(mean gap, 20 %, mean, 80 % of T̂) in quantile bins of the gap, of tokens within reach.

    Tokens with gap 0 are the first bin.
    """
    order = np.argsort(d.required, kind="stable")
    order = order[d.required[order] <= limit]
    zero = int((d.required[order] == 0).sum())
    curve = []
    for index in (order[:zero], *np.array_split(order[zero:], bins)):
        if len(index):
            T, gap = d.temperature[index], d.required[index].mean() * -math.log(min_p)
            low, high = np.quantile(T, (0.2, 0.8))
            curve.append((float(gap), float(low), float(T.mean()), float(high)))
    return curve


def reliability(
    first: Domain, others: Sequence[Domain], limit: float
) -> dict[str, list[tuple[float, float]]]:
    """(1 − α, measured coverage) by domain.

    Calibrated on every second document of the first, measured on its rest and on the others.
    """
    half = np.isin(first.document, np.unique(first.document)[::2])
    s = scores(first.required, first.raw, limit)
    curves: dict[str, list[tuple[float, float]]] = {d.name: [] for d in (first, *others)}
    if half.all():
        return curves  # one document: nothing is left to measure on
    for alpha in ALPHAS:
        try:
            found = calibrate(
                s[half], first.document[half], alpha=alpha, max_temperature=limit, samples=2
            )
        except ValueError:  # out of reach
            continue
        measured = {first.name: (first.required[~half], first.raw[~half])}
        measured |= {d.name: (d.required, d.raw) for d in others}
        for name, (required, predicted) in measured.items():
            covered = coverage(required, predicted, offset=found.offset, max_temperature=limit)
            curves[name].append((1 - alpha, covered))
    return curves


def costs(d: Domain, base: BaseModel, head: TemperatureHead, *, min_p: float) -> Costs:
    """What coverage costs: fixed temperatures, the head at several shifts, and the oracle."""
    picks = measures.sample(d.tokens, base.vocabulary)
    T, limit = torch.from_numpy(d.temperature)[picks], head.max_temperature
    policies: dict[tuple, torch.Tensor] = {("fixed", t): torch.full_like(T, t) for t in FIXED}
    policies |= {("head", shift): (T + shift).clamp(0.0, limit) for shift in SHIFTS}
    policies["oracle", 0] = torch.from_numpy(d.required)[picks].clamp(max=limit)
    sums = measures.measure(d.tokens.rows(picks), base, policies, min_p=min_p)
    means = {policy: measures.means(total) for policy, total in sums.items()}
    fixed = [sums["fixed", t] for t in FIXED]
    return Costs(
        fixed={t: means["fixed", t] for t in FIXED},
        shifted={shift: means["head", shift] for shift in SHIFTS},
        oracle=means["oracle", 0],
        comparisons=[
            measures.compare(sums["head", 0.0], fixed, axis)
            for axis in ("temperature", "kept_set_size")
        ],
    )


POLICY_COLUMNS = ["policy", "coverage", "mean T", "kept-set size", "nats a token"]


def policy_lines(found: Costs) -> list[list[str]]:
    """A line of text a policy, under `POLICY_COLUMNS`."""
    policies = {f"fixed T = {t:g}": measured for t, measured in found.fixed.items()}
    policies |= {"head": found.shifted[0.0], "oracle T*": found.oracle}
    return [
        [
            name,
            f"{measured['coverage']:.1%}",
            f"{measured['temperature']:.3f}",
            f"{measured['kept_set_size']:.2f}",
            f"{measured['nats']:.3f}",
        ]
        for name, measured in policies.items()
    ]


def sentence(found: Comparison) -> str:
    """What a comparison came to, whichever way."""
    verb = "covers as many, within the interval, as"
    if found.low > 0:
        verb = "covers more reference tokens than"
    elif found.high < 0:
        verb = "covers fewer reference tokens than"
    return (
        f"At equal {found.equal} the head {verb} the best fixed temperature: "
        f"{100 * found.difference:+.2f} points of coverage, 95 % interval {100 * found.low:+.2f} "
        f"to {100 * found.high:+.2f}."
    )


def _class_of(text: str) -> int:
    bare = text.strip()
    if not bare:
        return 0
    if bare.isdigit():
        return 3
    if bare.isidentifier():
        return 1 if text != text.lstrip() else 2
    return 4 if not any(c.isalnum() for c in bare) else 5


def classes_of(texts: Sequence[str]) -> np.ndarray:
    """The class of every token's text, an index into CLASSES."""
    return np.array([_class_of(text) for text in texts])


def passages(d: Domain, tokenizer, count: int = 4, length: int = 220) -> list[Passage]:
    """The first targets of some documents."""
    found = []
    documents = np.unique(d.document)
    for name in documents[:: max(1, len(documents) // count)][:count]:
        index = np.flatnonzero(d.document == name)[:length]
        texts = tokenizer.batch_decode([[int(i)] for i in d.tokens.target[index]])
        found.append(Passage(list(zip(texts, d.temperature[index].tolist()))))
    return found
