"""The demo's figure: coverage against what it costs, and the V-curve."""

from pathlib import Path

from autodeco_fast.files import atomic_write

_HEAD, _FIXED, _ORACLE = "#c2410c", "#475569", "#0f766e"


def _cost(
    axes, rows: dict, fixed: tuple, gravities: tuple, measure: str, label: str, names: str
) -> None:
    """Coverage of every policy against one measure; `names` is the side of the dots on which λ
    stands."""
    line = [rows[f"fixed {T:.1f}"] for T in fixed]
    axes.plot(
        [r[measure] for r in line],
        [r["coverage"] for r in line],
        "o-",
        ms=3,
        color=_FIXED,
        label="fixed T",
    )
    dots = [rows[f"head λ={g}"] for g in gravities]
    axes.plot(
        [r[measure] for r in dots],
        [r["coverage"] for r in dots],
        "D-",
        ms=6,
        color=_HEAD,
        label="head",
    )
    for gravity, r in zip(gravities, dots):
        place = (
            {"xytext": (8, -4), "ha": "left"}
            if names == "right"
            else {"xytext": (-8, 3), "ha": "right"}
        )
        axes.annotate(
            f"λ={gravity}",
            (r[measure], r["coverage"]),
            textcoords="offset points",
            fontsize=8,
            **place,
        )
    oracle = rows["oracle T*"]
    axes.plot(oracle[measure], oracle["coverage"], "*", ms=13, color=_ORACLE, label="oracle T*")
    axes.set_xlabel(label)
    axes.set_ylabel("coverage of the reference token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")


def draw(path: Path, rows: dict, curve: list, fixed: tuple, gravities: tuple) -> None:
    """Three panels, as PNG.

    Args:
        rows: policy → measures.
        curve: (mean gap, predicted T, required T) by bin, for λ = 0.1; empty if no reference token
            is within reach.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    _cost(left, rows, fixed, gravities, "temperature", "mean temperature", "left")
    _cost(middle, rows, fixed, gravities, "kept", "mean tokens inside the Min-P cut", "right")
    middle.set_xscale("log")
    gap, predicted, required = zip(*curve) if curve else ((), (), ())
    right.plot(gap, required, "s--", ms=4, color=_FIXED, label="required T*")
    right.plot(gap, predicted, "D-", ms=5, color=_HEAD, label="predicted T (λ=0.1)")
    right.set_xlabel("gap  z_max − z_y  (nats)")
    right.set_ylabel("temperature")
    right.grid(alpha=0.25)
    right.legend(frameon=False)
    for axes, title in (
        (left, "Coverage at a mean temperature"),
        (middle, "Coverage at a set size"),
        (right, "V-curve"),
    ):
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    atomic_write(path, lambda draft: figure.savefig(draft, dpi=130, format="png"))
