"""The report's figures, each drawn as PNG bytes from `training/report_data.py`."""

import io

import numpy as np

from autodeco_fast.training.figure_text import as_it_is
from autodeco_fast.training.report_data import BUCKETS, CLASSES, Costs, Domain, VCurve

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


def v_curves(domains: dict[str, tuple[VCurve, VCurve]], mass: float) -> bytes:
    """Predicted temperature against T* and against the width of the model's own nucleus, two panels
    a domain."""
    figure, axes = _figure(2 * len(domains))
    names = "required T* of the reference", f"width of the model's nucleus of mass {mass:g}"
    for (name, pair), panels, colour in zip(domains.items(), axes.reshape(-1, 2), _COLOURS):
        for a, curve, label in zip(panels, pair, names):
            x, low, mean, high = zip(*curve.points) if curve.points else ((), (), (), ())
            a.plot(x, x, "--", color=FIXED, label="T equal to it")
            a.fill_between(
                x, low, high, color=colour, alpha=0.2, lw=0, label="20 to 80 % of predictions"
            )
            a.plot(x, mean, "D-", ms=4, color=colour, label="predicted T, mean")
            a.set(title=as_it_is(f"{name}: {correlation(curve)}"), xlabel=label)
        panels[1].legend(frameon=False)
    axes[0].set_ylabel("temperature")
    return _png(figure)


def correlation(curve: VCurve) -> str:
    """Spearman's, in words."""
    return "no correlation" if curve.spearman is None else f"Spearman {curve.spearman:.2f}"


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
            label = as_it_is(f"calibrated, measured on {name}")
            a.plot(*zip(*curve), "o-", ms=4, color=colour, label=label)
    if trained is not None:
        a.plot(*trained, "*", ms=14, color=HEAD, label="the head as it is, at 1 − λ (within reach)")
    a.set(xlabel="promised: 1 − α", ylabel="measured coverage")
    a.legend(frameon=False)
    return _png(figure)


def costs(domains: dict[str, Costs]) -> bytes:
    """Coverage against mean temperature and against the tokens inside the cut, two panels a
    domain."""
    figure, axes = _figure(2 * len(domains))
    for (name, cost), pair in zip(domains.items(), axes.reshape(-1, 2)):
        for a, measure, label in zip(
            pair, ("temperature", "kept_set_size"), ("T", "kept-set size")
        ):
            _cost(a, cost.measures, measure)
            a.set(title=as_it_is(name), xlabel=f"mean {label}")
        pair[1].set_xscale("log")
        pair[1].legend(frameon=False, loc="lower right")
    axes[0].set_ylabel("coverage of the reference token")
    return _png(figure)


def _cost(axes, measures: dict[str, dict[str, float]], measure: str) -> None:
    for prefix, style, colour in (("fixed", "o-", FIXED), ("head", "D-", HEAD)):
        line = [m for key, m in measures.items() if key.startswith(prefix)]
        x, y = ([m[name] for m in line] for name in (measure, "coverage"))
        axes.plot(x, y, style, ms=4, color=colour, label=prefix)
    now, oracle = measures["head +0"], measures["oracle"]
    ring = {"ms": 9, "mfc": "none", "color": HEAD, "label": "head as it is"}
    axes.plot(now[measure], now["coverage"], "D", **ring)
    star = {"ms": 13, "color": ORACLE, "label": "oracle T*"}
    axes.plot(oracle[measure], oracle["coverage"], "*", **star)


def temperatures(d: Domain, limit: float) -> bytes:
    """Histograms of predicted temperature by difficulty bucket."""
    figure, (a,) = _figure(1)
    edges = np.linspace(0, limit, 61)
    for index, (name, colour) in enumerate(zip(BUCKETS, (ORACLE, HEAD, FIXED))):
        values = d.temperature[d.bucket == index]
        if len(values):
            share = len(values) / len(d.temperature)
            label = f"{name}: {share:.0%} of the tokens, mean {values.mean():.2f}"
            a.hist(values, edges, density=True, histtype="stepfilled", alpha=0.25, color=colour)
            a.hist(values, edges, density=True, histtype="step", color=colour, label=label)
    a.set(xlabel="predicted temperature", ylabel="density")
    a.legend(frameon=False)
    return _png(figure)


def by_class(d: Domain, classes: np.ndarray) -> bytes:
    """Quartiles of predicted temperature by class of token."""
    figure, (a,) = _figure(1)
    present = [i for i in range(len(CLASSES)) if (classes == i).any()]
    boxes = [d.temperature[classes == i] for i in present]
    names = [f"{CLASSES[i]}\n{len(b):,}" for i, b in zip(present, boxes)]
    a.boxplot(boxes, tick_labels=names, showfliers=False, medianprops={"color": HEAD}, whis=(5, 95))
    a.set_ylabel("predicted temperature")
    return _png(figure)
