"""Pieces of a self-contained HTML page that reads on a phone and prints."""

import base64
import html
from collections.abc import Sequence

from autodeco_fast.training.shading import colour

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e293b; background: #fff; }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption { color: #475569; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; white-space: nowrap; }
th, td { border-bottom: 1px solid #e2e8f0; }
th:first-child, td:first-child { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; line-height: 1.6; }
pre { background: #f8fafc; padding: .75rem; }
pre span { border-radius: 2px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
summary { cursor: pointer; padding: .5rem 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 0; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """The whole document."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>",
            f"<body><h1>{html.escape(title)}</h1>",
            *body,
            "</body></html>\n",
        ]
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def details(summary: str, body: Sequence[str]) -> str:
    """What opens when its summary is touched."""
    inside = "\n".join(body)
    return f"<details><summary>{html.escape(summary)}</summary>\n{inside}</details>"


def image(name: str, drawing: bytes, title: str, caption: str, *, kind: str = "png") -> str:
    """A figure, of PNG or `kind="svg+xml"`, with its heading and caption."""
    source = f"data:image/{kind};base64,{base64.b64encode(drawing).decode()}"
    return (
        f'{heading(title)}\n<figure id="{html.escape(name)}">'
        f'<img alt="{html.escape(title)}" src="{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def shaded(
    passage: Sequence[tuple[str, float]], limit: float, *, before: str = "", behind: str = ""
) -> str:
    """Text whose background is the warmer the higher the temperature, between texts without one."""
    spans = (
        f'<span title="T = {T:.2f}" style="background:{colour(T, limit)}">'
        f"{html.escape(text)}</span>"
        for text, T in passage
    )
    return f"<pre>{html.escape(before)}{''.join(spans)}{html.escape(behind)}</pre>"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells of text; the first column is left-aligned."""
    body = [_line(header, "th"), *(_line(line, "td") for line in lines)]
    return f'<div class="scroll"><table>{"".join(body)}</table></div>'


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
