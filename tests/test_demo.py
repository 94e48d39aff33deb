"""The demo on a few short texts: the same seed gives the same numbers; another model goes through
the same steps."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from autodeco_fast.demo import EMBEDDED_MODEL, run_demo
from autodeco_fast.training import report_figures
from tests.commands import save_tiny

FILES = ("demo.json", "head", "report", "samples.html", "scans", "texts")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = []
    for k in range(4):
        path = folder / f"{k}.txt"
        path.write_text(
            "".join(f"def f{i}(x, y={k}):\n    return x * {i} + y\n\n\n" for i in range(30))
        )
        paths.append(path)
    return paths


def run(texts, output, **options) -> dict:
    """The report's numbers."""
    run_demo(**{"output": output, "text": texts, "model": None, "seed": 3, **options})
    assert sorted(p.name for p in output.iterdir()) == sorted(FILES)
    return json.loads((output / "report/report.json").read_text())["held-out"]


@pytest.mark.slow
def test_same_seed_same_numbers(texts, tmp_path, monkeypatch):
    """Also in the folder of an earlier demo, which is replaced."""
    first = run(texts, tmp_path / "a")
    monkeypatch.setattr(report_figures, "_png", lambda figure: b"")  # drawn once; it takes longest
    assert run(texts, tmp_path / "b") == first
    assert run(texts, tmp_path / "b", seed=4) != first
    assert {"fixed 0.1", "fixed 2", "head +0", "oracle"} <= set(first["measures"])
    assert set(first["comparisons"]) == {"mean temperature", "kept-set size"}
    page = (tmp_path / "a/samples.html").read_text()
    assert page.count("<h2>") == 1 + 3  # the prompt, three ways
    assert page.count('title="T = ') > 200
    assert (tmp_path / "a/report/report.html").stat().st_size > 50_000


def test_a_folder_of_somebody_else_is_left_alone(texts, tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/mine").write_text("x")
    with pytest.raises(ValueError, match="holds head/ already"):
        run_demo(output=tmp_path, text=texts)
    assert [p.name for p in tmp_path.iterdir()] == ["head"]
    assert (tmp_path / "head/mine").read_text() == "x"


def test_texts_of_which_nothing_can_be_learned(tmp_path):
    texts = [tmp_path / name for name in "xy"]
    for path in texts:
        path.write_text(path.name)
    with pytest.raises(
        ValueError, match=r"nothing is selected|no token was left|must have a target"
    ):
        run_demo(output=tmp_path / "out", text=texts)


def test_a_model_of_few_positions(tmp_path):
    """Learned ones, fewer than the demo's windows have."""
    folder = save_tiny(tmp_path / "model")
    shape = {
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    GPT2LMHeadModel(GPT2Config(vocab_size=96, **shape)).save_pretrained(folder)
    texts = [tmp_path / name for name in "ab"]
    for path in texts:
        path.write_text("w5 w6 w7 [/red] " * 100)  # no markup
    assert run(texts, tmp_path / "out", model=str(folder))["measures"]


def test_another_model(texts, tmp_path):
    """A softcapped one, from a folder."""
    torch.manual_seed(0)
    shape = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_size": 24,
    }
    config = Gemma2Config(
        vocab_size=8192, intermediate_size=32, final_logit_softcapping=5.0, **shape
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(tmp_path / "model")
    report = run(texts, tmp_path / "out", model=str(tmp_path / "model"))
    # Random weights: about ln 8192.
    assert report["measures"]["fixed 1"]["nll"] == pytest.approx(9.0, abs=0.5)
