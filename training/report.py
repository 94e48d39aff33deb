"""`autodeco-fast report`: a self-contained page of a head on scans, figures and measures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autodeco_fast import TemperatureHead
from autodeco_fast.files import atomic_write, output_folder, write_text
from autodeco_fast.training import report_data as data
from autodeco_fast.training import report_figures as figures
from autodeco_fast.training import report_page as html
from autodeco_fast.training.base_model import load_tokenizer
from autodeco_fast.training.conformal import coverage
from autodeco_fast.training.file_names import CALIBRATION_NAME
from autodeco_fast.training.head_on_scan import (
    check_every_token,
    check_fits,
    min_p_of,
    scanned_model,
    training_settings,
)
from autodeco_fast.training.report_data import Costs, Domain, Passage
from autodeco_fast.training.report_page import Figure
from autodeco_fast.training.scan_store import Scan

PAGE, RECORD = "report.html", "report.json"


@dataclass(frozen=True)
class _Subject:
    """What is reported on."""

    head: TemperatureHead
    name: str
    settings: dict  # of its training
    min_p: float
    domains: list[Domain]
    costs: dict[str, Costs]  # by domain
    tokenizer: object

    @property
    def limit(self) -> float:
        return self.head.max_temperature


def report_from_files(
    head_folder: Path,
    scans: Sequence[Path],
    output: Path,
    *,
    model: str | None = None,
    min_p: float | None = None,
    samples: Sequence[Passage] = (),
) -> None:
    """Writes `report.html`, its figures as PNG files and `report.json`; says what it found.

    Args:
        scans: named by their folders.
        output: folder, made if missing.
        model: folder or hub id of the scanned model; from where it was by default.
        min_p: of the cut; the head's own by default.
        samples: text that was generated, to be shown too.

    Raises:
        ValueError: for a head, scans or a model that do not belong together, or an output that
            cannot be written.
    """
    names = [folder.resolve().name for folder in scans]
    if len(set(names)) < len(names):
        raise ValueError(
            f"scans are named by their folders, which must differ, got {', '.join(names)}"
        )
    with output_folder(output):
        subject = _open(head_folder, dict(zip(names, scans)), model=model, min_p=min_p)
        _write(subject, output, samples)
    _say(subject)


def _open(
    head_folder: Path, scans: dict[str, Path], *, model: str | None, min_p: float | None
) -> _Subject:
    head, settings = TemperatureHead.from_pretrained(head_folder), training_settings(head_folder)
    opened = {name: Scan(folder) for name, folder in scans.items()}
    for scan in opened.values():
        check_fits(head, settings, scan)
        check_every_token(scan)
    min_p = min_p_of(head, settings, min_p)
    first = next(iter(opened.values()))
    base = scanned_model(first, model)
    tokenizer = load_tokenizer(model or first.manifest["settings"]["model"])
    domains = [data.domain(name, scan, head, min_p=min_p) for name, scan in opened.items()]
    return _Subject(
        head=head,
        name=head_folder.name,
        settings=settings,
        min_p=min_p,
        domains=domains,
        costs={d.name: data.costs(d, base, head, min_p=min_p) for d in domains},
        tokenizer=tokenizer,
    )


def _write(subject: _Subject, output: Path, samples: Sequence[Passage]) -> None:
    curves = {d.name: data.v_curve(d, subject.min_p, subject.limit) for d in subject.domains}
    drawn = _figures(subject, curves)
    for figure in drawn:
        atomic_write(output / f"{figure.name}.png", partial(_write_bytes, figure.png))
    record = {
        "head": subject.name,
        "min_p": subject.min_p,
        "offset": subject.head.offset,
        "scans": {
            name: {**asdict(costs), "v_curve": curves[name]}
            for name, costs in subject.costs.items()
        },
    }
    write_text(output / RECORD, json.dumps(record, indent=1) + "\n")
    write_text(output / PAGE, html.page(_facts(subject), _sections(subject, drawn, samples)))


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _facts(subject: _Subject) -> str:
    offset = f"offset {subject.head.offset:+.3f} (see {CALIBRATION_NAME})"
    calibrated = offset if subject.head.offset else "not calibrated"
    return (
        f"Head {subject.name}, {calibrated}. Min-P {subject.min_p:g}; temperatures up to "
        f"{subject.limit:g}. Coverage is the share of reference tokens in the kept set; intervals "
        "resample documents."
    )


def _sections(subject: _Subject, drawn: Sequence[Figure], samples: Sequence[Passage]) -> list[str]:
    sections = [_summary(subject)]
    for name, costs in subject.costs.items():
        sections.append(html.heading(f"{name}: the head and fixed temperatures"))
        sections.append(html.items(map(data.sentence, costs.comparisons)))
        sections.append(html.table(data.POLICY_COLUMNS, data.policy_lines(costs)))
    sections += [html.figure(figure) for figure in drawn]
    if samples:
        sections.append(html.heading("Continuations of one prompt, shaded by temperature"))
        sections += [html.shaded(sample, subject.limit) for sample in samples]
    for d in subject.domains:
        sections.append(html.heading(f"{d.name}, shaded by temperature"))
        passages = data.passages(d, subject.tokenizer)
        sections += [html.shaded(passage, subject.limit) for passage in passages]
    return sections


def _summary(subject: _Subject) -> str:
    lines = []
    for d in subject.domains:
        covered = coverage(d.required, d.temperature, max_temperature=subject.limit)
        reachable = (d.required <= subject.limit).mean()
        documents = len(set(d.document.tolist()))
        shares = f"{covered:.1%}", f"{d.temperature.mean():.3f}", f"{reachable:.1%}"
        lines.append([d.name, f"{len(d.tokens):,}", f"{documents:,}", *shares])
    header = ["text", "tokens", "documents", "coverage", "mean T", "reachable at T_max"]
    return html.table(header, lines)


def _figures(subject: _Subject, curves: dict[str, list]) -> list[Figure]:
    first, *others = subject.domains
    texts = subject.tokenizer.batch_decode([[int(i)] for i in first.tokens.target])
    trained = None
    if "gravity" in subject.settings and not subject.head.offset:
        covered = coverage(first.required, first.raw, max_temperature=subject.limit)
        trained = 1 - subject.settings["gravity"], covered
    reliability = data.reliability(first, others, subject.limit)
    elsewhere = ", and on the other text, where nothing is promised" if others else ""
    return [
        Figure(
            name="v-curve",
            png=figures.v_curves(curves, subject.min_p),
            title="V-curve",
            caption="Predicted temperature against the model's own gap between its best token and "
            "the reference. A head that knew the gap would follow the dashed line.",
        ),
        Figure(
            name="reliability",
            png=figures.reliability(reliability, trained),
            title="Reliability",
            caption=f"The offset is calibrated on every second document of {first.name} and "
            f"measured on the rest{elsewhere}.",
        ),
        Figure(
            name="cost",
            png=figures.costs(subject.costs),
            title="What coverage costs",
            caption="Coverage against mean temperature and against the size of the kept set, on a "
            "sample of the tokens. The head's line shifts its temperatures by a constant. Up and "
            "to the left is better.",
        ),
        Figure(
            name="difficulty",
            png=figures.temperatures(first, subject.limit),
            title="Temperature by difficulty",
            caption="Trivial: the argmax is right and has more than 90 %; impossible: more than "
            "100 tokens rank above the reference.",
        ),
        Figure(
            name="classes",
            png=figures.by_class(first, data.classes_of(texts)),
            title="Temperature by class of token",
            caption="Medians and quartiles by the reference token's text; whiskers from 5 to 95 %; "
            "below the names, the tokens.",
        ),
    ]


def _say(subject: _Subject) -> None:
    """The table and the comparison of every domain, on standard error."""
    console = Console(stderr=True, markup=False)
    for name, costs in subject.costs.items():
        table = Table(*data.POLICY_COLUMNS, title=name)
        for line in data.policy_lines(costs):
            table.add_row(*line)
        console.print(table)
        for comparison in costs.comparisons:
            console.print(data.sentence(comparison), soft_wrap=True)
