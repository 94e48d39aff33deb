"""The report's figures, each drawn as PNG bytes from `training/report_data.py`."""

import io
import math

import numpy as np

from autodeco_fast.training.report_data import BUCKETS, CLASSES, Domain

HEAD, FIXED, ORACLE, OTHER = "#c2410c", "#475569", "#0f766e", "#7c3aed"
_COLOURS = (HEAD, OTHER, ORACLE, "#a16207")


def _figure(columns: int, width: float = 7.0, height: float = 4.4):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width * (1 if columns == 1 else 0.85 * columns), height), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, columns, sharey=True))
    for a in axes:
        a.grid(alpha=0.25)
        a.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def v_curves(curves: dict[str, list], min_p: float) -> bytes:
    """Predicted temperature against the model's own gap, one panel a domain."""
    figure, axes = _figure(len(curves))
    for a, (name, curve), colour in zip(axes, curves.items(), _COLOURS):
        gap, low, mean, high = zip(*curve)
        a.plot(gap, [g / -math.log(min_p) for g in gap], "--", color=FIXED, label="required T*")
        a.fill_between(
            gap, low, high, color=colour, alpha=0.2, lw=0, label="20 to 80 % of predictions"
        )
        a.plot(gap, mean, "D-", ms=4, color=colour, label="predicted T, mean")
        a.set(title=name, xlabel="gap  z_max − z_y  (nats)")
        a.legend(frameon=False)
    axes[0].set_ylabel("temperature")
    return _png(figure)


def reliability(
    curves: dict[str, list[tuple[float, float]]], trained: tuple[float, float] | None
) -> bytes:
    """Promised against measured coverage; `trained` is 1 − λ and the coverage of the head as it
    is."""
    figure, (a,) = _figure(1)
    low = min((x for curve in curves.values() for point in curve for x in point), default=0.5)
    a.plot([low, 1], [low, 1], "--", color=FIXED, lw=1, label="as promised")
    for (name, curve), colour in zip(curves.items(), _COLOURS):
        if curve:
            a.plot(*zip(*curve), "o-", ms=4, color=colour, label=f"calibrated, measured on {name}")
    if trained is not None:
        a.plot(*trained, "*", ms=14, color=HEAD, label="the head as it is, at 1 − λ")
    a.set(xlabel="promised: 1 − α", ylabel="measured coverage")
    a.legend(frameon=False)
    return _png(figure)


def costs(tables: dict[str, dict[str, dict[str, float]]]) -> bytes:
    """Coverage against the mean number of tokens inside the cut, one panel a domain."""
    figure, axes = _figure(len(tables))
    for a, (name, rows) in zip(axes, tables.items()):
        for prefix, style, colour in (("fixed", "o-", FIXED), ("head", "D-", HEAD)):
            line = [r for key, r in rows.items() if key.startswith(prefix)]
            a.plot(
                [r["kept"] for r in line],
                [r["coverage"] for r in line],
                style,
                ms=4,
                color=colour,
                label=prefix,
            )
        now = rows["head +0"]
        a.plot(
            now["kept"], now["coverage"], "D", ms=9, mfc="none", color=HEAD, label="head as it is"
        )
        a.plot(
            rows["oracle"]["kept"],
            rows["oracle"]["coverage"],
            "*",
            ms=13,
            color=ORACLE,
            label="oracle T*",
        )
        a.set(title=name, xlabel="mean tokens inside the Min-P cut", xscale="log")
        a.legend(frameon=False, loc="lower right")
    axes[0].set_ylabel("coverage of the reference token")
    return _png(figure)


def temperatures(d: Domain, limit: float) -> bytes:
    """Histograms of predicted temperature by difficulty bucket."""
    figure, (a,) = _figure(1)
    edges = np.linspace(0, limit, 61)
    for index, (name, colour) in enumerate(zip(BUCKETS, (ORACLE, HEAD, FIXED))):
        values = d.temperature[d.bucket == index]
        if len(values):
            label = f"{name}: {len(values) / len(d.temperature):.0%} of the tokens, mean {values.mean():.2f}"
            a.hist(values, edges, density=True, histtype="stepfilled", alpha=0.25, color=colour)
            a.hist(values, edges, density=True, histtype="step", color=colour, label=label)
    a.set(xlabel="predicted temperature", ylabel="density")
    a.legend(frameon=False)
    return _png(figure)


def by_class(d: Domain, classes: np.ndarray) -> bytes:
    """Quartiles of predicted temperature by kind of token."""
    figure, (a,) = _figure(1)
    present = [i for i in range(len(CLASSES)) if (classes == i).any()]
    boxes = [d.temperature[classes == i] for i in present]
    names = [f"{CLASSES[i]}\n{len(b):,}" for i, b in zip(present, boxes)]
    a.boxplot(boxes, tick_labels=names, showfliers=False, medianprops={"color": HEAD}, whis=(5, 95))
    a.set_ylabel("predicted temperature")
    return _png(figure)
