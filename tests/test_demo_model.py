"""The demo on a real model: where the model comes from, and its steps on a tiny one."""

import json

import pytest

from autodeco_fast import TemperatureHead
from autodeco_fast.demo import compare, records, run_demo, smollm2


def by_length(completions, **_):
    """A reward that differs."""
    return [float(len(text) % 7) for text in completions]


@pytest.fixture
def no_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "gguf_file", lambda: None)


def test_without_the_wheel_one_line_says_what_to_install(no_wheel):
    assert not smollm2.available()
    with pytest.raises(ValueError, match=r"^smollm2-135m-instruct is not installed: pip install"):
        smollm2.folder()


def test_it_is_converted_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "gguf_file", lambda: tmp_path / "m.gguf")
    monkeypatch.setattr(smollm2, "available", lambda: True)

    def fails(source, target):
        (target / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", fails)
    with pytest.raises(KeyboardInterrupt):
        smollm2.folder()
    assert not list((tmp_path / "autodeco_fast").iterdir())

    calls = []

    def converts(source, target):
        calls.append(source)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_convert", converts)
    first = smollm2.folder()
    assert first == smollm2.folder() == smollm2.cache_folder()
    assert calls == [tmp_path / "m.gguf"]
    assert [path.name for path in first.iterdir()] == ["config.json"]


def test_the_head_that_ships_fits_the_model():
    head = TemperatureHead.from_pretrained(compare.HEAD)
    assert (head.hidden_size, head.min_p, head.offset) == (576, 0.1, 0.0)


def test_without_it_the_small_model_is_taken(no_wheel, monkeypatch, tmp_path, capsys):
    taken = []
    monkeypatch.setattr("autodeco_fast.demo.pipeline.run", lambda *a, **k: taken.append(k))
    run_demo(output=tmp_path / "out")
    assert taken == [{"text": None, "model": None, "seed": 0}]
    assert "smollm2-135m-instruct is not here" in capsys.readouterr().err


@pytest.mark.slow
def test_its_steps(model, monkeypatch, tmp_path, capsys):
    TemperatureHead(32, min_p=0.1).save_pretrained(tmp_path / "given")
    small = {"SAMPLES": 2, "NEW_TOKENS": 5, "SCHEMAS": 2, "RECORDS": 3, "RECORD_TOKENS": 4}
    small |= {"ROUNDS": 2, "SCHEMAS_A_ROUND": 2, "RECORDS_A_ROUND": 4}
    small |= {"HEAD": tmp_path / "given", "REWARD": f"{__file__}:by_length"}
    for name, value in small.items():
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(smollm2, "available", lambda: True)
    monkeypatch.setattr(smollm2, "folder", lambda: model)
    output = tmp_path / "out"
    for _ in range(2):  # the second time into the folder of the first
        run_demo(output=output)
    assert sorted(p.name for p in output.iterdir()) == [
        *("demo.json", "evaluation", "head", "records-head", "samples.html", "texts")
    ]
    page = (output / "samples.html").read_text()
    assert page.count("<h2>") == 1 + 4  # the prompt, four policies
    assert page.count("<pre>") == 1 + 1 + 3 * 2
    results = json.loads((output / "evaluation/results.json").read_text())
    assert {p["family"] for p in results["policies"]} == {"static", "head"}
    assert TemperatureHead.from_pretrained(output / "head").hidden_size == 32
    assert "adaptive" in capsys.readouterr().out


def test_schemas_and_their_reward():
    names = [schema.name for part in records.PARTS.values() for schema in part]
    assert len(names) == len(set(names))
    headings = {part: {s.heading for s in some} for part, some in records.PARTS.items()}
    assert not headings["train"] & headings["test"]
    schema = records.TEST[0]
    line = json.loads(schema.line)
    good = ' "fox", "habitat": "forest", "weight_kg": 6}\nand more'
    bad = (' "fox", "habitat": "forest"}', ' "fox", "habitat": 1, "weight_kg": 2, "x": 3}', "", "{")
    given = {key: [line[key]] * 5 for key in ("keys", "prefix", "first_line")}
    assert records.valid([good, *bad], **given) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert line["prompt"].endswith('\n{"animal":')
