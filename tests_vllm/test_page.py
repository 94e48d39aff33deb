"""What `make serve` runs, with SmolLM2, seen in a browser."""

import re
import selectors
import shlex
import signal
import subprocess
import sys

import httpx
import pytest

from autodeco_fast import TemperatureHead
from autodeco_fast.demo import smollm2
from tests.browser import BROWSER, tab
from tests_vllm.engines import ROOT, environment

NEW_TOKENS = 30
FINISHED = "document.querySelectorAll('[data-state=done], [data-state=error]').length == 2"
TEMPERATURES = """Array.from(document.querySelectorAll('#%s .drawn'),
    each => Number(each.dataset.temperature))"""
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium found"),
    pytest.mark.skipif(not smollm2.available(), reason="SmolLM2 is not installed"),
]


@pytest.fixture
def served(tmp_path):
    """The process, and the address that it prints."""
    recipe = re.search(
        r"^serve:.*\n\t@exec \S+/bin/python (.*)$", (ROOT / "Makefile").read_text(), re.M
    )
    with (tmp_path / "stderr").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(recipe[1]), "--port", "0", "--api-port", "0"],
            cwd=ROOT,
            env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            assert ready.select(400), (tmp_path / "stderr").read_text()
        found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert found, (tmp_path / "stderr").read_text()
        yield process, found[0]
    finally:
        process.terminate()
        process.wait(60)


def test_two_completions_side_by_side(served, tmp_path):
    process, url = served
    query = f"max_tokens={NEW_TOKENS}&completions=1&t_scale=0.5&go=1"
    with tab(f"{url}?{query}", tmp_path) as opened:
        opened.wait_for(FINISHED, 240)
        shown = opened.value("document.body.innerText")
        assert opened.value("document.getElementById('problem').hidden"), shown
        for side in ("static", "adaptive"):
            text = opened.value(f"document.querySelector('#{side} .text').innerText")
            assert re.match(r'\{"animal": *"?\w', text), text
        limit = TemperatureHead.from_pretrained(smollm2.HEAD).max_temperature
        T = opened.value(TEMPERATURES % "adaptive")
        assert 3 < len(T) <= NEW_TOKENS
        assert all(0 < each <= 0.5 * limit for each in T)
        assert max(T) > 2 * min(T)
        assert set(opened.value(TEMPERATURES % "static")) == {1}
        assert opened.console == []
        api = opened.value("about.api")
    (model,) = httpx.get(f"{api}/models", timeout=30).json()["data"]
    assert model["id"] == smollm2.NAME
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{api}/models", timeout=30)
