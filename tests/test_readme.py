"""The README's Python examples run as they stand; its console commands are run by .ci/run."""

import re
from pathlib import Path

from autodeco_fast import TemperatureHead

ROOT = Path(__file__).resolve().parent.parent


def test_python_examples_run(tmp_path):
    model = ROOT / "autodeco_fast/demo/model"
    TemperatureHead(256).save_pretrained(tmp_path / "head")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = (
        "\n".join(blocks)
        .replace("path/to/model", str(model))
        .replace("path/to/head", str(tmp_path / "head"))
    )
    scope: dict = {}
    exec(code, scope)
    assert scope["tokens"].shape[1] > scope["inputs"]["input_ids"].shape[1]
    assert all(p.grad is not None for p in scope["head"].parameters())


def test_every_named_file_exists():
    text = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
