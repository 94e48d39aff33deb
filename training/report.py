"""`autodeco-fast report`: one self-contained page and its figures, of a head on one scan or
several."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import training_settings
from autodeco_fast.files import atomic_write, output_folder, write_text
from autodeco_fast.training import report_data as data
from autodeco_fast.training import report_figures as figures
from autodeco_fast.training import report_page as html
from autodeco_fast.training.base_model import load_tokenizer
from autodeco_fast.training.conformal import coverage
from autodeco_fast.training.head_folder import (
    CALIBRATION_NAME,
    check_every_token,
    check_fits,
    min_p_of,
)
from autodeco_fast.training.measures import SAMPLE, scanned_model
from autodeco_fast.training.scan_store import Scan
from autodeco_fast.urls import Location, Url

PAGE, NUMBERS = "report.html", "report.json"
PASSAGES, PASSAGE_TOKENS = 4, 220
DEFAULT_GRAVITY = 0.1  # of a head that nothing is written beside
_MEASURES = ("policy", "coverage", "mean T", "kept-set size", "nats a token")


@dataclass
class Subject:
    """What is reported on."""

    head: TemperatureHead
    folder: Path
    settings: dict
    min_p: float

    @property
    def mass(self) -> float:
        """1 − λ, in [0, 1]; of a head that does not say its λ, 0.9."""
        return min(max(1.0 - self.settings.get("gravity", DEFAULT_GRAVITY), 0.0), 1.0)

    @property
    def limit(self) -> float:
        return self.head.max_temperature


def _summary(domains: list[data.Domain], limit: float) -> str:
    lines = []
    for d in domains:
        reached = (d.required <= limit).mean()
        covered = coverage(d.required, d.temperature, max_temperature=limit)
        numbers = f"{len(d.tokens):,}", f"{len(set(d.example.tolist())):,}"
        lines.append(
            [d.name, *numbers, f"{covered:.1%}", f"{d.temperature.mean():.3f}", f"{reached:.1%}"]
        )
    return html.table(
        ["text", "tokens", "documents", "coverage", "mean T", "reachable at T_max"], lines
    )


def report_from_files(
    head_folder: Path,
    scans: list[Location],
    output: Path,
    *,
    model: str | None = None,
    min_p: float | None = None,
) -> None:
    """Writes `report.html` and its figures as PNG files to `output`. Scans are named by their
    folders.

    Raises:
        ValueError: for a head, scans or a model that do not belong together, or an output that
            cannot be written.
    """
    names = [(at if isinstance(at, Url) else at.resolve()).name for at in scans]
    if len(set(names)) < len(names):
        raise ValueError(
            f"scans are named by their folders, which must differ, got {', '.join(names)}"
        )
    with output_folder(output):
        _report(head_folder, dict(zip(names, scans)), output, model=model, min_p=min_p)


def _report(
    head_folder: Path,
    scans: dict[str, Location],
    output: Path,
    *,
    model: str | None,
    min_p: float | None,
) -> None:
    head, settings = TemperatureHead.from_pretrained(head_folder), training_settings(head_folder)
    opened = [Scan(folder) for folder in scans.values()]
    for scan in opened:
        check_fits(head, settings, scan)
        check_every_token(scan)
    subject = Subject(
        head=head,
        folder=head_folder,
        settings=settings,
        min_p=min_p_of(head, min_p),
    )
    base = scanned_model(opened[0], model)
    tokenizer = load_tokenizer(model or opened[0].manifest["settings"]["model"])
    domains = [
        data.domain(name, scan, head, min_p=subject.min_p) for name, scan in zip(scans, opened)
    ]
    costs = {d.name: data.costs(d, base, head, min_p=subject.min_p) for d in domains}
    curves = {
        d.name: data.v_curves(d, base, mass=subject.mass, min_p=subject.min_p, limit=subject.limit)
        for d in domains
    }
    body = [html.paragraph(_facts(subject)), _summary(domains, subject.limit)]
    body += _compared(costs)
    classes = data.classes_of(data.target_texts(tokenizer, domains[0].tokens))
    for name, drawing in _drawings(
        subject, domains, costs=costs, curves=curves, classes=classes
    ).items():
        png = drawing[0]
        atomic_write(output / f"{name}.png", lambda draft, png=png: draft.write_bytes(png))
        body.append(html.image(name, *drawing))
    for d in domains:
        body.append(html.heading(f"{d.name}, shaded by temperature"))
        passages = data.passages(d, tokenizer, count=PASSAGES, length=PASSAGE_TOKENS)
        body += [html.shaded(passage, subject.limit) for passage in passages]
    numbers = {
        name: {
            "measures": cost.measures,
            "comparisons": cost.comparisons,
            "spearman": {
                "required_temperature": curves[name][0].spearman,
                "nucleus_width": curves[name][1].spearman,
                "nucleus_mass": subject.mass,
            },
        }
        for name, cost in costs.items()
    }
    write_text(output / NUMBERS, json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    write_text(output / PAGE, html.page("What the head does, token by token", body))
    _print(costs, curves)


def _facts(subject: Subject) -> str:
    offset = subject.head.offset
    calibrated = (
        f", offset {offset:+.3f} (see {CALIBRATION_NAME})" if offset else ", not calibrated"
    )
    reach = f"Min-P {subject.min_p:g}; temperatures up to {subject.limit:g}."
    return f"Head {subject.folder.name}{calibrated}. {reach}"


def _cells(measures: dict[str, dict[str, float]]) -> list[list[str]]:
    return [
        [
            name,
            f"{measured['coverage']:.1%}",
            f"{measured['temperature']:.3f}",
            f"{measured['kept_set_size']:.2f}",
            f"{measured['nll']:.3f}",
        ]
        for name, measured in measures.items()
    ]


def verdict(axis: str, result: tuple[float, float, float]) -> str:
    """One plain sentence."""
    difference, low, high = (100 * x for x in result)
    word = "wins against" if low > 0 else "loses to" if high < 0 else "ties with"
    points = f"{difference:+.2f} points of coverage, 95 % interval {low:+.2f} to {high:+.2f}"
    return f"At equal {axis} the head {word} the best fixed temperature: {points}."


def _compared(costs: dict[str, data.Costs]) -> list[str]:
    """Tables of all policies, and how the head does beside the best fixed temperature."""
    blocks = []
    for name, cost in costs.items():
        blocks.append(html.heading(f"{name}: the head and fixed temperatures"))
        blocks += [html.paragraph(verdict(*pair)) for pair in cost.comparisons.items()]
        blocks.append(html.table(_MEASURES, _cells(cost.measures)))
    return blocks


def _print(
    costs: dict[str, data.Costs], curves: dict[str, tuple[data.VCurve, data.VCurve]]
) -> None:
    """The same on the terminal: as it is, and the fixed temperatures."""
    console = Console(stderr=True, markup=False)
    for name, cost in costs.items():
        table = Table(*_MEASURES, title=name)
        for cells in _cells(cost.measures):
            if cells[0].startswith("fixed") or cells[0] in ("head +0", "oracle"):
                table.add_row(*cells)
        console.print(table)
        for pair in cost.comparisons.items():
            console.print(verdict(*pair))
        console.print(_follows(curves[name]))


def _follows(pair: tuple[data.VCurve, data.VCurve]) -> str:
    """How closely T follows what it could follow."""
    of_target, of_nucleus = map(figures.correlation, pair)
    return (
        f"T with the width of the model's own nucleus ({pair[1].reachable:.0%} of them within "
        f"reach): {of_nucleus}; with the realised gap of the one reference token, which is mostly "
        f"luck: {of_target}."
    )


def _drawings(
    subject: Subject,
    domains: list[data.Domain],
    *,
    costs: dict[str, data.Costs],
    curves: dict[str, tuple[data.VCurve, data.VCurve]],
    classes,
) -> dict[str, tuple[bytes, str, str]]:
    """name → (PNG, title, caption)."""
    first, limit = domains[0], subject.limit
    trained = None
    reached = first.required <= limit  # what λ is a share of
    hinge = subject.settings.get("objective") == "min_p_hinge" and reached.any()
    if hinge and "gravity" in subject.settings and not subject.head.offset:
        as_it_is = coverage(first.required[reached], first.raw[reached], max_temperature=limit)
        trained = 1 - subject.settings["gravity"], as_it_is
    promised = data.reliability(first, domains[1:], limit)
    elsewhere = ", and on the other text, where nothing is promised." if domains[1:] else "."
    return {
        "v-curve": (
            figures.v_curves(curves, subject.mass),
            "V-curve",
            "Predicted temperature against the temperature that the reference token needed, and "
            "against the one at which the kept set has "
            f"{subject.mass:g} of the model's own probability, on {SAMPLE:,} tokens at most; what "
            f"lies beyond {limit:g} is not drawn. The "
            "first is one draw, mostly luck, and no head can follow it; the second is what a head "
            "can know, and what it learns where the model is calibrated. "
            + " ".join(f"{name}: {_follows(pair)}" for name, pair in curves.items()),
        ),
        "reliability": (
            figures.reliability(promised, trained),
            "Reliability",
            f"The offset is calibrated on every second document of {first.name} and measured on "
            f"the rest{elsewhere}",
        ),
        "cost": (
            figures.costs(costs),
            "What coverage costs",
            f"Coverage against mean temperature and against the tokens inside the cut, on "
            f"{SAMPLE:,} tokens at most. The head's line shifts its temperatures by a constant. Up "
            "and to the left is better.",
        ),
        "difficulty": (
            figures.temperatures(first, limit),
            "Temperature by difficulty",
            "Trivial: the argmax is right and has more than 90 %; impossible: more than 100 tokens "
            "rank above the reference.",
        ),
        "classes": (
            figures.by_class(first, classes),
            "Temperature by class of token",
            "Medians and quartiles by the reference token's text; whiskers from 5 to 95 %; below "
            "the names, the tokens.",
        ),
    }
