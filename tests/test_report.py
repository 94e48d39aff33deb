"""The report, opened in a real browser."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autodeco_fast.training.report import report_from_files
from autodeco_fast.training.report_data import CLASSES, classes_of, passages, target_texts
from tests.browser import BROWSER, opened
from tests.scans import link_embedded
from tests.tokenizers_of_kinds import TEXT, every_tokenizer, tokenizer_of

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


def _domain(kind: str, text: str):
    """A document's targets: all tokens but the first."""
    target = torch.tensor(tokenizer_of(kind)(text).input_ids[1:])
    tokens = SimpleNamespace(target=target, document=torch.zeros(len(target)).long())
    return SimpleNamespace(
        tokens=tokens, document=tokens.document.numpy(), temperature=np.ones(len(target))
    )


@every_tokenizer
def test_passages_read_as_the_text(kind):
    tokenizer, text = tokenizer_of(kind), "the " + TEXT
    (passage,) = passages(_domain(kind, text), tokenizer, count=1, length=999)
    assert text.endswith("".join(text for text, _ in passage))
    assert text.removeprefix(tokenizer.decode(tokenizer(text).input_ids[:1])) == "".join(
        text for text, _ in passage
    )


def test_a_word_begins_behind_a_space():
    texts = target_texts(tokenizer_of("llama"), _domain("llama", "the cat sat on the mat").tokens)
    assert texts == [" cat", " sat", " on", " the", " mat"]
    assert {CLASSES[c] for c in classes_of(texts)} == {"word start"}


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_a_character_of_several_tokens_is_of_one_class(kind):
    texts = target_texts(tokenizer_of(kind), _domain(kind, "the東京").tokens)
    assert texts[-6:] == ["", "", "東", "", "", "京"]
    assert [CLASSES[c] for c in classes_of(texts)[-6:]] == ["inside a word"] * 6


def test_targets_are_read_in_their_documents():
    """Which may be mixed."""
    tokenizer = tokenizer_of("llama")
    one, other = (tokenizer(text).input_ids for text in ("the cat", "Tür 東"))
    ids = [i for pair in zip(other, one * 9) for i in pair]
    tokens = SimpleNamespace(target=torch.tensor(ids), document=torch.arange(len(ids)) % 2)
    texts = target_texts(tokenizer, tokens)
    assert "".join(texts[::2]) == " Tür 東"
    assert "".join(texts[1::2]).startswith(" the cat")


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
