"""The report's page: one HTML file that needs nothing else."""

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass

from autodeco_fast.training.report_data import Passage

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e293b; background: #fff; }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption { color: #475569; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid #e2e8f0; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; line-height: 1.6; }
pre { background: #f8fafc; padding: .75rem; } .prompt { color: #64748b; }
pre span { border-radius: 2px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
@media print { body { max-width: none; padding: 0; } }
"""
_TITLE = "What the head does, token by token"
_HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>Temperature head report</title><style>{_STYLE}</style>"
)


@dataclass(frozen=True)
class Figure:
    """A figure with what is said of it."""

    name: str
    png: bytes
    title: str
    caption: str


def page(facts: str, sections: Iterable[str]) -> str:
    body = "\n".join([f"<h1>{_TITLE}</h1>", f"<p>{html.escape(facts)}</p>", *sections])
    return f'<!doctype html>\n<html lang="en"><head>{_HEAD}</head>\n<body>{body}\n</body></html>\n'


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def figure(found: Figure) -> str:
    source = f"data:image/png;base64,{base64.b64encode(found.png).decode()}"
    image = f'<img alt="{html.escape(found.title)}" src="{source}">'
    caption = f"<figcaption>{html.escape(found.caption)}</figcaption>"
    return f'{heading(found.title)}\n<figure id="{found.name}">{image}{caption}</figure>'


def shaded(passage: Passage, limit: float) -> str:
    """Text whose background is the warmer the higher the temperature."""
    spans = [f'<span class="prompt">{html.escape(passage.prompt)}</span>' if passage.prompt else ""]
    for text, T in passage.tokens:
        style = f"background:rgba(234,88,12,{0.75 * T / limit:.2f})"
        spans.append(f'<span title="T = {T:.2f}" style="{style}">{html.escape(text)}</span>')
    title = f"<h3>{html.escape(passage.title)}</h3>" if passage.title else ""
    return f"{title}<pre>{''.join(spans)}</pre>"


def table(header: list[str], lines: list[list[str]]) -> str:
    body = "".join(_line(line, "td") for line in lines)
    return f'<div class="scroll"><table>{_line(header, "th")}{body}</table></div>'


def _line(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def items(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(s)}</li>" for s in sentences) + "</ul>"
