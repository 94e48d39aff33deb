"""`autodeco-fast report`: one self-contained page and its figures, of a head on one scan or
several."""

import base64
import html
from pathlib import Path

from autodeco_fast import TemperatureHead
from autodeco_fast.files import atomic_write, output_folder, write_text
from autodeco_fast.training import report_data as data
from autodeco_fast.training import report_figures as figures
from autodeco_fast.training.base_model import load_tokenizer
from autodeco_fast.training.calibrate import (
    CALIBRATION_NAME,
    check_every_token,
    check_fits,
    cut_of,
    training_settings,
)
from autodeco_fast.training.conformal import coverage
from autodeco_fast.training.policy_means import SAMPLE, scanned_model
from autodeco_fast.training.scan_store import Scan

PAGE = "report.html"
PASSAGES, PASSAGE_TOKENS = 4, 220

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e293b; background: #fff; }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption { color: #475569; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; border-bottom: 1px solid #e2e8f0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; line-height: 1.6; }
pre { background: #f8fafc; padding: .75rem; }
pre span { border-radius: 2px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
@media print { body { max-width: none; padding: 0; } }
"""


def _image(name: str, png: bytes, title: str, caption: str) -> str:
    encoded = base64.b64encode(png).decode()
    source = f"data:image/png;base64,{encoded}"
    return (
        f'<h2>{html.escape(title)}</h2>\n<figure id="{name}"><img alt="{html.escape(title)}" src="{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _shaded(passage: list[tuple[str, float]], limit: float) -> str:
    """Text whose background is the warmer the higher the temperature."""
    spans = (
        f'<span title="T = {T:.2f}" style="background:rgba(234,88,12,{0.75 * T / limit:.2f})">{html.escape(text)}</span>'
        for text, T in passage
    )
    return f"<pre>{''.join(spans)}</pre>"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f'<div class="scroll"><table>{line(header, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def _summary(domains: list[data.Domain], limit: float) -> str:
    rows = []
    for d in domains:
        reached = (d.required <= limit).mean()
        covered = coverage(d.required, d.temperature, 0.0, limit)
        numbers = f"{len(d.tokens):,}", f"{len(set(d.document.tolist())):,}"
        rows.append(
            [d.name, *numbers, f"{covered:.1%}", f"{d.temperature.mean():.3f}", f"{reached:.1%}"]
        )
    return _table(["text", "tokens", "documents", "coverage", "mean T", "reachable at T_max"], rows)


def report_from_files(
    head_folder: Path, scans: list[Path], output: Path, model: str | None, min_p: float | None
) -> None:
    """Writes `report.html` and its figures as PNG files to `output`. Scans are named by their
    folders.

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
        _report(head_folder, dict(zip(names, scans)), output, model, min_p)


def _report(
    head_folder: Path, scans: dict[str, Path], output: Path, model: str | None, min_p: float | None
) -> None:
    head, settings = TemperatureHead.from_pretrained(head_folder), training_settings(head_folder)
    opened = [Scan(folder) for folder in scans.values()]
    for scan in opened:
        check_fits(head, settings, scan)
        check_every_token(scan)
    min_p = cut_of(head, settings, min_p)
    base = scanned_model(opened[0], model)
    tokenizer = load_tokenizer(model or opened[0].manifest["settings"]["model"])
    domains = [data.domain(name, scan, head, min_p) for name, scan in zip(scans, opened)]
    page = _page(head, settings, head_folder, domains, base, tokenizer, min_p, output)
    write_text(output / PAGE, page)


def _page(head, settings, head_folder, domains, base, tokenizer, min_p, output) -> str:
    limit, first = head.max_temperature, domains[0]
    parts, many = [], len(domains) > 1
    curves = {d.name: data.v_curve(d, min_p, limit) for d in domains}
    trained = None
    if "gravity" in settings and not head.offset:
        trained = 1 - settings["gravity"], coverage(first.required, first.raw, 0.0, limit)
    classes = data.classes_of(tokenizer.batch_decode([[int(i)] for i in first.tokens.target]))
    drawn = {
        "v-curve": (
            figures.v_curves(curves, min_p),
            "V-curve",
            "Predicted temperature against the model's own gap between its best token and the "
            "reference. A head that knew the "
            "gap would follow the dashed line.",
        ),
        "reliability": (
            figures.reliability(data.reliability(first, domains[1:], limit), trained),
            "Reliability",
            f"The offset is calibrated on every second document of {first.name} and measured on "
            "the rest" + (", and on the other text, where nothing is promised." if many else "."),
        ),
        "cost": (
            figures.costs({d.name: data.costs(d, base, head, min_p) for d in domains}),
            "What coverage costs",
            f"Coverage against the tokens inside the cut, on {SAMPLE:,} tokens at most. The head's "
            "line shifts its "
            "temperatures by a constant. Up and to the left is better.",
        ),
        "difficulty": (
            figures.temperatures(first, limit),
            "Temperature by difficulty",
            "Trivial: the argmax is right and has more than 90 %; impossible: more than 100 tokens "
            "rank above the reference.",
        ),
        "classes": (
            figures.by_class(first, classes),
            "Temperature by kind of token",
            "Medians and quartiles by the reference token's text; whiskers from 5 to 95 %; below "
            "the names, the tokens.",
        ),
    }
    for name, (png, title, caption) in drawn.items():
        atomic_write(output / f"{name}.png", lambda draft, png=png: draft.write_bytes(png))
        parts.append(_image(name, png, title, caption))
    for d in domains:
        parts.append(f"<h2>{html.escape(d.name)}, shaded by temperature</h2>")
        parts += [_shaded(p, limit) for p in data.passages(d, tokenizer, PASSAGES, PASSAGE_TOKENS)]
    offset = (
        f", offset {head.offset:+.3f} (see {CALIBRATION_NAME})"
        if head.offset
        else ", not calibrated"
    )
    facts = f"Head {head_folder.name}{offset}. Min-P {min_p:g}; temperatures up to {limit:g}."
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>Temperature head report</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>What the head does, token by token</h1><p>{html.escape(facts)}</p>\n"
        f"{_summary(domains, limit)}\n" + "\n".join(parts) + "\n</body></html>\n"
    )
