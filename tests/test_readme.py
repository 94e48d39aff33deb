"""The Python examples of the README and of docs/ run as they stand; console commands are run by
.ci/run."""

import re
from pathlib import Path

import pytest

from autodeco_fast import TemperatureHead

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def run(page: str, tmp_path: Path) -> dict:
    """The scope that the Python blocks of a page leave behind, run one after another."""
    model = ROOT / "autodeco_fast/demo/model"
    TemperatureHead(256).save_pretrained(tmp_path / "head")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    code = (
        "\n".join(blocks)
        .replace("path/to/model", str(model))
        .replace("path/to/head", str(tmp_path / "head"))
        .replace("path/to/checkpoint", str(tmp_path / "checkpoint"))
    )
    scope: dict = {}
    exec(code, scope)
    return scope


def test_python_examples_of_the_readme_run(tmp_path):
    scope = run("README.md", tmp_path)
    for tokens in (scope["before"], scope["tokens"]):
        assert tokens.shape[1] > scope["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize("page", ["docs/recipes.md", "docs/autodeco.md"])
def test_python_examples_that_write_run(tmp_path, page):
    scope = run(page, tmp_path)
    assert scope["tokens"].shape[1] > scope["batch"]["input_ids"].shape[1]


@pytest.mark.parametrize(("page", "trained"), [("functions", "head"), ("autodeco", "heads")])
def test_python_examples_that_train_run(tmp_path, page, trained):
    scope = run(f"docs/{page}.md", tmp_path)
    assert all(p.grad is not None for p in scope[trained].parameters())


def anchors(text: str) -> set[str]:
    """The names that headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_link_leads_somewhere(page):
    path = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_public_name_is_listed():
    import autodeco_fast

    table = (ROOT / "docs/functions.md").read_text().partition("## All names")[2]
    assert set(re.findall(r"`([A-Za-z]\w+)`", table)) >= set(autodeco_fast.__all__)
