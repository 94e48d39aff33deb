"""The frontier of an evaluation: score against diversity, as SVG."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autodeco_fast.training.figure_text import as_it_is

_COLOURS = (
    "#475569", "#c2410c", "#0f766e", "#7c3aed", "#a16207", "#1d4ed8", "#be185d", "#4d7c0f",
)  # fmt: skip
_MARKERS = "oDs^vPX*"
_NAMED_UP_TO = 12  # points that are numbered and named beside the axes
_PARENTS = re.compile(r"(?<==)\S*/(?=[^/\s])")  # of a head's folder


def short(policy: str) -> str:
    """A policy without the folders that its head's lies in."""
    return _PARENTS.sub("…/", policy)


@dataclass(frozen=True)
class Point:
    """A policy: two measures, each with the ends of its interval, None where there is none."""

    policy: str
    family: str
    score: dict[str, float | None]  # mean, low, high
    diversity: dict[str, float | None]

    @property
    def at(self) -> tuple[float, float]:
        return self.diversity["mean"], self.score["mean"]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one measure without losing in the other, by diversity."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.at[0], -p.at[1])):
        if not best or point.at[1] > best[-1].at[1]:
            best.append(point)
    return best[::-1]


def _bars(x: dict) -> tuple[list[float], list[float]] | None:
    if x["low"] is None:
        return None
    return [max(0.0, x["mean"] - x["low"])], [max(0.0, x["high"] - x["mean"])]


def draw(points: Sequence[Point], label: str) -> bytes:
    """One curve a family, through its frontier; every policy is a point with its intervals."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    named = len(points) <= _NAMED_UP_TO
    figure = Figure(figsize=(8.8 if named else 6.4, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    families = list(dict.fromkeys(point.family for point in points))
    for number, family in enumerate(families):
        colour = _COLOURS[number % len(_COLOURS)]
        marker = _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
        members = [point for point in points if point.family == family]
        for point in members:
            x, y = point.at
            bars = {"xerr": _bars(point.diversity), "yerr": _bars(point.score)}
            axes.errorbar(
                x,
                y,
                **bars,
                fmt=marker,
                ms=5,
                color=colour,
                ecolor=colour,
                elinewidth=0.6,
                alpha=0.8,
            )
            if named:
                axes.annotate(
                    points.index(point) + 1, (x, y), xytext=(4, 4), textcoords="offset points",
                    fontsize=8, color=colour,
                )  # fmt: skip
        axes.plot(
            *zip(*(point.at for point in frontier(members))),
            color=colour, lw=1.5, marker=marker, ms=5, label=as_it_is(family),
        )  # fmt: skip
    axes.set(xlabel=label, ylabel="score")
    axes.legend(frameon=False, fontsize=8, loc="lower left")  # falling curves leave it free
    if named:
        names = [
            as_it_is(f"{number}  {short(point.policy)}") for number, point in enumerate(points, 1)
        ]
        figure.legend(
            [Line2D([], [], ls="")] * len(names), names, loc="outside right upper", handlelength=0,
            frameon=False, fontsize=8,
        )  # fmt: skip
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "autodeco_fast"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
