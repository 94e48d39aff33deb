"""Names of families, heads and scans in figures: any text, shown as it is."""

import pytest

from autodeco_fast.training import report_figures
from autodeco_fast.training.eval_figures import Point, draw
from autodeco_fast.training.report_data import Costs, VCurve

NAMES = ["_cold", "a $x^$ b", "cost $5 to $10", r"$\foo$", r"a\$b", "a_b"]


@pytest.mark.parametrize("name", NAMES)
def test_families_and_policies_are_in_the_legends(name):
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    drawn = draw([Point(f"head={name}", name, interval, interval)], "x").decode()
    assert f"{name} -->" in drawn.replace("\u200b", "").replace(f"head={name} -->", "")
    assert f"1  head={name} -->" in drawn


def test_scans_are_in_the_figures(monkeypatch):
    """The very texts that matplotlib draws."""
    seen = []

    def texts(figure) -> bytes:
        figure.draw_without_rendering()
        for axes in figure.axes:
            legend = axes.get_legend()
            seen.extend([axes.title, *(legend.get_texts() if legend else ())])
        return b""

    monkeypatch.setattr(report_figures, "_png", texts)
    name = r"$\foo$"
    measured = dict.fromkeys(("temperature", "coverage", "kept_set_size"), 0.5)
    policies = dict.fromkeys(("fixed 1", "head +0", "oracle"), measured)
    curve = VCurve([(0.5, 0.4, 0.5, 0.6)], 0.5, 1.0)
    report_figures.costs({name: Costs(policies, {})})
    report_figures.v_curves({name: (curve, curve)}, 0.9)
    report_figures.reliability({name: [(0.9, 0.8), (0.8, 0.8)]}, None)
    named = [text._preprocess_math(text.get_text()) for text in seen if "foo" in text.get_text()]
    assert len(named) == 5
    assert all(name in text and not is_formula for text, is_formula in named)
