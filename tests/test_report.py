"""The report, opened in a real browser."""

import json
import re
from pathlib import Path

import pytest

from autodeco_fast.training.report import report_from_files
from autodeco_fast.training.report_data import CLASSES, classes_of
from tests.browser import BROWSER, opened
from tests.scans import link_embedded

FIGURES = ["v-curve", "reliability", "cost", "difficulty", "classes"]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = link_embedded(tmp_path_factory.mktemp("embedded"))
    scans = [folder / "held-out", folder / "backwards"]
    report_from_files(folder / "head", scans, folder / "report", model=None, min_p=None)
    return folder / "report"


@pytest.mark.slow
def test_is_one_page_and_its_figures(report):
    page = (report / "report.html").read_text()
    assert sorted(p.name for p in report.iterdir()) == sorted(
        ["report.html", "report.json", *(f"{name}.png" for name in FIGURES)]
    )
    assert re.findall(r'<figure id="([\w-]+)"', page) == FIGURES
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing from elsewhere
    assert page.count("<pre>") == 8
    assert "held-out" in page
    numbers = json.loads((report / "report.json").read_text())
    assert set(numbers) == {"held-out", "backwards"}
    for domain in numbers.values():
        assert {"fixed 0.1", "fixed 2", "head +0", "oracle"} <= set(domain["measures"])
        found = domain["spearman"]
        assert found["nucleus_mass"] == 0.9
        assert -1 < found["required_temperature"] < 1
        assert f"within reach): Spearman {found['nucleus_width']:.2f}" in page
        for axis, (difference, low, high) in domain["comparisons"].items():
            assert low <= difference <= high
            assert f"At equal {axis} the head " in page
    assert "backwards" in page
    for name in FIGURES:
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
@pytest.mark.parametrize("width", [390, 1280])
def test_opens_in_a_browser(report, width, tmp_path):
    """Every figure is decoded, nothing is wider than the screen but what scrolls, the console is
    silent."""
    seen, said = opened((report / "report.html").read_text(), width, tmp_path)
    assert len(seen["figures"]) == len(FIGURES)
    assert all(natural > 500 for natural in seen["figures"])
    assert seen["wide"] <= seen["screen"]
    assert "CONSOLE" not in said


@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
def test_the_browser_would_tell(tmp_path):
    """The control: a broken picture, a wide line, an error."""
    page = "<title></title><body><img src='data:image/png;base64,xx'><p style='width:5000px'>x"
    page += "</p><script>nothing()</script></body>"
    seen, said = opened(page, 1280, tmp_path)
    assert seen["figures"] == [0]
    assert seen["wide"] > seen["screen"]
    assert "CONSOLE" in said


def test_classes_of_tokens():
    names = [CLASSES[i] for i in classes_of(["\n    ", " def", "ine", "42", " 7", "):", " a+b"])]
    assert names == [
        "space",
        "word start",
        "inside a word",
        "number",
        "number",
        "punctuation",
        "other",
    ]
