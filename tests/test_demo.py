"""The demo on a few short texts: same seed, same numbers; another model takes the same steps."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from autodeco_fast import TemperatureHead
from autodeco_fast.demo import EMBEDDED_MODEL, run_demo
from tests.commands import save_tiny

FOLDERS = ("head", "report", "scans", "text")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = []
    for k in range(4):
        path = folder / f"{k}.txt"
        path.write_text(
            "".join(f"def f{i}(x, y={k}):\n    return x * {i} + y\n\n\n" for i in range(60))
        )
        paths.append(path)
    return paths


def run(texts, output, **options) -> dict:
    run_demo(**{"output": output, "text": texts, "model": None, "seed": 3, **options})
    assert sorted(p.name for p in output.iterdir()) == sorted(FOLDERS)
    return json.loads((output / "report/report.json").read_text())["scans"]["held-out"]


@pytest.mark.slow
def test_same_seed_same_numbers(texts, tmp_path, capsys):
    first, second = run(texts, tmp_path / "a"), run(texts, tmp_path / "b")
    assert first == second
    said = capsys.readouterr().out
    assert said.count("(shaded by predicted temperature") == 6
    assert said.count("$ autodeco-fast ") == 12
    assert run(texts, tmp_path / "b", seed=4) != first  # where there was one already
    assert {"0.1", "2.0"} < set(first["fixed"])
    assert {"0.0", "0.2"} < set(first["shifted"])
    assert first["oracle"]["coverage"] >= first["shifted"]["0.0"]["coverage"]
    page = (tmp_path / "a/report/report.html").read_text()
    assert page.count("<h3>") == 3
    assert page.count('title="T = ') > 200
    assert [c["equal"] for c in first["comparisons"]] == ["mean temperature", "kept-set size"]
    assert TemperatureHead.from_pretrained(tmp_path / "a/head").min_p == 0.02


def test_nothing_of_somebody_else_is_touched(texts, tmp_path):
    for name in ("mine", "head/mine", "scans/held-out/mine"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    for path in texts[:2]:
        (tmp_path / path.name).write_text("x")
    short = [tmp_path / path.name for path in texts[:2]]
    with pytest.raises(ValueError, match="no token was left to learn from: min_p"):
        run_demo(output=tmp_path, text=short)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {"mine", "head/mine", "scans/held-out/mine", *(p.name for p in short)}


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
    assert run(texts, tmp_path / "out", model=str(folder))["fixed"]


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
    assert report["fixed"]["1.0"]["nats"] == pytest.approx(9.0, abs=0.5)
