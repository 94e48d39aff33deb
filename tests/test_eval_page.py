"""The page of an evaluation: one file that needs nothing else and reads on a phone."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training import eval_page, report_page
from autodeco_fast.training.eval_page import PROMPTS, show_tables, tables
from autodeco_fast.training.eval_store import Sample
from autodeco_fast.training.shading import colour, token_texts
from tests.browser import BROWSER, opened
from tests.evaluations import POLICIES, run, samples_of, write_prompts
from tests.tokenizers_of_kinds import TEXT, every_tokenizer, tokenizer_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def output(model, tmp_path_factory) -> Path:
    """Of a run with hostile prompts and long names of policies, records scored."""
    folder = tmp_path_factory.mktemp("page")
    hostile = {
        "prompt": "<script>alert(1)</script> & " + "w5" * 400,
        "keys": ["a", "<b>"],
        "task": "<i>",
    }
    path = write_prompts(folder / "prompts.jsonl", 8, keys=["a", "<b>"])
    path.write_text(json.dumps(hostile) + "\n" + path.read_text())
    long = "static T=0.123456789 min_p=0.0123456789 t_min=0.0123456789 t_max=1.987654321"
    run(folder, model, policy=(*POLICIES, long), scorer="json")
    return folder / "out"


@pytest.fixture(scope="module")
def page(output) -> str:
    return (output / "eval.html").read_text()


def test_needs_nothing_else(page):
    assert not re.findall(r'(?:src|href|xlink:href)="(?!data:)', page)
    assert not re.findall(r"@import|url\((?!data:)", page)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; w5" in page


def test_reads_on_a_phone(page):
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count('<div class="scroll"><table>') == 4


def test_figures_are_whole_svg_with_a_curve_a_family(page):
    """For each task the share of different samples; no entropy, as nothing is valid."""
    figures = re.findall(r'data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(figures) == 4
    for figure in figures:
        root = ElementTree.fromstring(base64.b64decode(figure))
        assert root.tag == f"{SVG}svg"
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith("#") for link in links)
        texts = ElementTree.tostring(root, encoding="unicode")
        assert "http://" not in re.sub(r'xmlns:?\w*="[^"]*"', "", texts).replace(
            "http://purl.org", ""
        )


def test_names_are_no_markup():
    """Of tasks, which may be any text."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    name, title = '"><script>-distinct', '"><b>'
    parser.feed(report_page.image(name, b"", title, "<i>"))
    assert [tag for tag, _ in found] == ["h2", "figure", "img", "figcaption"]
    assert found[1][1] == {"id": name}
    assert found[2][1]["alt"] == title


def test_a_sample_that_is_cut_off_is_marked(model, output):
    tokenizer = AutoTokenizer.from_pretrained(model)
    sample = Sample(**json.loads((output / "samples.jsonl").open().readline()))
    for n, marked in ((400, False), (401, True)):
        tokens = (sample.tokens * n)[:n]
        shown = eval_page._shaded(replace(sample, tokens=tokens, temperature=[1.0] * n), tokenizer)
        assert shown.count("<span") == 400
        assert shown.endswith("…</pre>") == marked


def test_samples_are_shaded_token_by_token(page, output, model):
    assert page.count("<details>") == PROMPTS
    samples = samples_of(output)
    shown = [s for s in samples.values() if s["prompt"] < PROMPTS and s["sample"] < 2]
    assert page.count('title="T = ') == sum(s["length"] for s in shown)
    assert f'title="T = 1.50" style="background:{colour(1.5)}"' in page


def test_every_policy_and_task_is_in_a_table(page):
    for name in (*POLICIES, "entropy of &lt;b&gt;", "Measures: &lt;i&gt;", "pass@3"):
        assert name in page


def test_tables_fit_a_narrow_terminal(output):
    """Its main columns in it; whole where there is room, and in a file."""
    results = json.loads((output / "results.json").read_text())
    over = {"entropy": {"mean": -0.125, "low": -0.25, "high": 0.0625}}
    results["policies"][-1]["over_fixed"] = dict.fromkeys(results["policies"][0]["tasks"], over)
    for terminal, width, whole in ((True, 60, False), (True, 300, True), (False, 80, True)):
        console = Console(file=StringIO(), force_terminal=terminal, width=width, markup=False)
        assert show_tables(console, results) == whole
        shown = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
        assert "policy" in shown
        assert ("truncated" in shown) == ("distinct valid@" in shown) == whole
        assert "score" in shown
        assert "over fixed" in shown
        assert "t_max=1.987654321" in shown.replace("\n", "") or not whole
        assert (max(map(len, shown.splitlines())) <= width) == (terminal or not whole)


def test_prompts_with_few_right_records_are_told_of(page, output):
    """Nothing is valid here; where all prompts have enough, there is no such column."""
    assert "<th>few records</th>" in page
    results = json.loads((output / "results.json").read_text())
    table = tables(results)[0]
    assert "few records: prompts whose entropy is of fewer right ones" in table.caption
    (column,) = (c for c in table.columns if c.header == "few records")
    assert set(column.cells) == {"100%"}
    for policy in results["policies"]:
        policy["tasks"]["all"]["few_records"]["mean"] = 0.0
    assert "few records" not in [c.header for c in tables(results)[0].columns]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
@pytest.mark.parametrize("width", [390, 1280])
def test_opens_in_a_browser(page, width, tmp_path):
    """All details open: nothing is wider than the screen but what scrolls."""
    opened_page = page.replace("<details>", "<details open>")
    seen, said = opened(opened_page, width, tmp_path)
    assert len(seen["figures"]) == 4
    assert all(natural > 300 for natural in seen["figures"])
    assert seen["wide"] <= seen["screen"]
    assert "CONSOLE" not in said


def test_texts_of_tokens_make_the_text():
    """Characters of several tokens stand with the last of them."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    text = 'def f(x):\n    return "größe – 雪 🏔"  # ok'
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "" in texts
    assert not any("\ufffd" in t for t in texts)
    assert token_texts(tokenizer, []) == []


@every_tokenizer
def test_texts_of_tokens_make_the_text_of_any_tokenizer(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(TEXT).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == TEXT
    assert not any("\ufffd" in t for t in texts)


def test_colours_go_from_white_to_orange():
    assert colour(0.0) == "rgb(255,255,255)"
    assert colour(2.0) == colour(9.0) == "rgb(239,130,73)"
    assert colour(1.0, hottest=1.0) == colour(2.0)
