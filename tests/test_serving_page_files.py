"""The files of the page of `make serve`, as they are written."""

import re
from html.parser import HTMLParser

from tests.commands import ROOT

PAGE = ROOT / "autodeco_fast/demo/serve/page"


def test_the_page_needs_nothing_from_elsewhere():
    whole = "".join(path.read_text() for path in PAGE.iterdir())
    assert set(re.findall(r"https?://[^\s\"']+", whole)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|\beval\(|document\.write", whole)  # prompts are text


class _Labels(HTMLParser):
    """Ids, and controls with what names them."""

    def __init__(self):
        super().__init__()
        self.ids, self.open, self.named, self.controls = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.named |= {attrs["for"]} if "for" in attrs else set()
        if tag in ("input", "textarea", "select"):
            self.controls.append((attrs["id"], "label" in self.open))
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_control_has_a_label():
    labels = _Labels()
    labels.feed((PAGE / "index.html").read_text())
    assert not labels.open
    assert len(labels.ids) == len(set(labels.ids))
    assert len(labels.controls) == 8
    for name, inside in labels.controls:
        assert inside or name in labels.named, name
    used = set(re.findall(r'find\("#([\w-]+)', (PAGE / "page.js").read_text()))
    assert used <= set(labels.ids)
