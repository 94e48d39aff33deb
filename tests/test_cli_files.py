"""Files that the commands cannot use, and settings in them: one line each, and nothing is left."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model
from autodeco_fast.training.scan_store import MANIFEST, shard_path
from tests.commands import assert_refuses, command, listing
from tests.scans import write_examples


def test_heads_that_do_not_fit_or_are_broken(model, head, tmp_path):
    TemperatureHead(8).save_pretrained(tmp_path / "narrow")
    options = ("--model", model, "--prompt", "w5", "--head")
    assert_refuses(
        command("generate", *options, tmp_path / "narrow"), "head has width 8", "takes 32"
    )
    (head / "head.safetensors").write_bytes(b"not tensors")
    assert_refuses(command("generate", *options, head), "is not a safetensors file")


def break_weights(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model must be a folder or a hub id"


def drop_weights(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "lacks 1 of its weights: model.layers.1.mlp.up_proj.weight"


def lose_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model must be a folder or a hub id"


def odd_config(folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "a"}))
    return "model must be a folder or a hub id"


def deep_config(folder: Path) -> str:
    (folder / "config.json").write_text("[" * 100_000)
    return "model must be a folder or a hub id"


@pytest.mark.parametrize(
    "change", [break_weights, drop_weights, lose_weights, odd_config, deep_config]
)
def test_models_that_cannot_be_loaded(model, head, tmp_path, change):
    folder = shutil.copytree(model, tmp_path / "model")
    words = change(folder)
    assert_refuses(command("generate", "--model", folder, "--head", head, "--prompt", "w5"), words)
    rows = write_examples(tmp_path / "rows.jsonl", 4)
    for name in ("scan", "train"):
        assert_refuses(
            command(name, "--model", folder, "--data", rows, "--output", tmp_path / "out"), words
        )
    assert not (tmp_path / "out").exists()


def test_train_reads_the_data_before_the_model(tmp_path):
    """The model does not exist, and the complaint is about the data."""
    options = ("--model", tmp_path / "no-model", "--output", tmp_path / "out")
    data = tmp_path / "rows.jsonl"
    assert_refuses(command("train", *options, "--data", data), "which is no file")
    data.write_text('{"text": "a"}\n{"text": ')
    for name in ("train", "scan"):
        assert_refuses(command(name, *options, "--data", data), "rows.jsonl, line 2: not JSON")
    assert_refuses(
        command("train", *options, "--data", data, "--min-p", 1.5),
        "min_p must be in (0, 1), got 1.5",
    )
    data.write_text('{"text": "a"}\n')
    assert_refuses(command("train", *options, "--data", data), "model must be a folder or a hub id")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            '{"input_ids": [3, 96], "labels": [3, 96]}',
            "line 2: input_ids must be in [0, 96), the model's vocabulary",
        ),
        ('{"input_ids": [3, -1], "labels": [3, -100]}', "line 2: input_ids must be in [0, 96)"),
        (
            '{"input_ids": [3, 1e3], "labels": [3, -100]}',
            "line 2: input_ids and labels must be lists of integers",
        ),
        ('{"text": "w3 \\ud800"}', "line 2: text must be Unicode, got a lone surrogate"),
        (
            '{"messages": [{"role": "user", "content": [{"a": "\\udfff"}]}]}',
            "line 2: text must be Unicode",
        ),
        ("[" * 100_000, "line 2: not JSON: RecursionError"),
    ],
)
def test_rows_that_cannot_be_used_are_named(model, tmp_path, row, words):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "w5 w6 w7"}\n' + row + "\n")
    for name in ("train", "scan"):
        assert_refuses(
            command(name, "--model", model, "--data", data, "--output", tmp_path / "out"), words
        )
        assert "head.safetensors" not in str(listing(tmp_path))


def test_data_without_a_target_leaves_nothing(model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": ""}\n{"input_ids": [3, 4], "labels": [-100, -100]}\n')
    for name in ("train", "scan"):
        done = command(name, "--model", model, "--data", data, "--output", tmp_path / "out")
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert (
            last
            == "error: data must have a target within max_length 256, none of its 2 examples has"
        )
        assert not (tmp_path / "out").exists()


def test_a_selection_that_leaves_nothing_names_the_setting(model, scan, tmp_path):
    base = base_model.load(str(model), torch.bfloat16)
    rows, sure = write_examples(tmp_path / "rows.jsonl", 6), tmp_path / "sure.jsonl"
    with sure.open("w") as file:
        for first in range(3, 9):
            ids = [first, int(base.logits(base.hidden(torch.tensor([[first]]))[0]).argmax())]
            file.write(json.dumps({"input_ids": ids, "labels": [-100, ids[1]]}) + "\n")
    trivial = ("--trivial-prob", 0, "--easy-fraction", 0)
    for name, data, options, words in (
        ("scan", rows, ("--max-rank", 0, *trivial), "max_rank dropped all"),
        ("scan", sure, trivial, "easy_fraction dropped all"),
        ("scan", rows, ("--max-bytes", 50), "max_bytes leaves less than one of"),
        ("train", rows, ("--max-rank", 0, *trivial), "max_rank 0 dropped all"),
        ("train", sure, trivial, "easy_fraction 0 dropped all"),
        ("train", rows, ("--min-p", 0.9999, *trivial), "min_p 0.9999 puts every target"),
        ("train", rows, ("--eval-fraction", 0.9999), "eval_fraction 0.9999 holds out all"),
        ("train", rows, ("--eval-fraction", 0.0001), "eval_fraction 0.0001 holds out none"),
    ):
        done = command(
            name, "--model", model, "--data", data, "--output", tmp_path / "out", *options
        )
        assert done.returncode == 2, (options, done.stderr)
        assert words in done.stderr.strip().splitlines()[-1]
        assert not {"scan.json", "head.safetensors"} & {path.name for path in tmp_path.rglob("*")}
    done = command("train", "--scan", scan, "--output", tmp_path / "out", "--eval-fraction", 0.9999)
    assert "eval_fraction 0.9999 holds out all" in done.stderr


def test_options_win_over_the_file(scan, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"gravity: 1e-3\nlearning_rate: 1e-3\nmax_memory: 2G\nscan: {scan}\nmin_p: 0.3\n"
    )
    done = command("train", "--config", path, "--output", tmp_path / "out", "--min-p", 0.2)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "out/training.json").read_text())
    assert (settings["gravity"], settings["learning_rate"], settings["max_memory"]) == (
        1e-3,
        1e-3,
        2 * 10**9,
    )
    assert settings["min_p"] == 0.2


def test_switches_win_over_the_file_too(scan, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("resume: true\n")
    options = ("train", "--config", path, "--scan", scan, "--output", tmp_path / "out")
    assert command(*options, "--max-steps", 1, "--no-resume").returncode == 0
    assert "there is nothing to resume" in command(*options, "--max-steps", 1).stderr
    assert_refuses(command(*options, "--no-resume"), "holds a head already")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gravity:", "gravity must be a finite number, got None"),
        ("gravity: .inf", "gravity must be a finite number, got inf"),
        ("gravity: [1]", "gravity must be a finite number, got [1]"),
        ("gravity: yes", "gravity must be a finite number, got True"),
        ("gravity: many", "gravity must be a finite number, got 'many'"),
        ("scan: 2024-01-01", "scan must be a path or a URL, got datetime.date(2024, 1, 1)"),
        ("max_steps: 1.5", "max_steps must be an integer in"),
        ("max_steps: 1e3", "max_steps must be an integer in"),
        ("max_memory: 2 G B", "max_memory must be an integer in"),
        ("resume: 1", "resume must be true or false, got 1"),
        ("objective: 3", "objective must be text, got 3"),
        ("seed: 99999999999999999999", "seed must be an integer in"),
        ("2: 3\na: 4", "must map names of settings to values, got 'a', 2"),
        ("gravty: 0.2", "run.yaml: unknown setting gravty; did you mean gravity?"),
        ("- a", "must map names of settings to values, got list"),
        ("a: [", "is not YAML"),
        ("when: 2024-13-45", "is not YAML"),
        ("a: !!bool b", "is not YAML"),
        ("[" * 600, "is not YAML: RecursionError"),
    ],
)
def test_odd_yaml_is_one_line(scan, tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    options = () if "scan:" in text else ("--scan", scan)
    assert_refuses(
        command("train", "--config", path, "--output", tmp_path / "out", *options), words
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["inf", "nan", "1e400", "2X", "", "-1", "--1", "1e30"])
def test_odd_sizes_are_one_line(model, tmp_path, size):
    rows = write_examples(tmp_path / "rows.jsonl", 2)
    options = ("--model", model, "--data", rows, "--output", tmp_path / "out")
    done = command("scan", *options, f"--max-bytes={size}")
    assert_refuses(
        done, "max_bytes" if size in ("-1", "1e30") else "a size must be a number of bytes"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("gravity=0.1,0.10", "sweep must list a value once"),
        ("gravity=0.1 gravity=0.2", "sweep must name a setting once, got gravity twice"),
        ("gravity=0.1,inf", "gravity must be a finite number, got inf"),
        ("seed=1,99999999999999999999999", "seed must be an integer in"),
        ("output=1", "sweep must be like"),
        ("", "sweep must be like"),
    ],
)
def test_odd_sweeps_are_one_line(scan, tmp_path, grid, words):
    assert_refuses(
        command("train", "--scan", scan, "--output", tmp_path / "out", "--sweep", grid), words
    )
    assert not (tmp_path / "out").exists()


def test_a_sweep_into_the_folder_of_a_head_is_refused(scan, head):
    before = listing(head)
    done = command("train", "--scan", scan, "--output", head, "--sweep", "gravity=0.1,0.2")
    assert_refuses(done, "holds a head already; name another folder")
    assert listing(head) == before


def test_near_points_of_a_sweep_have_folders_of_their_own(scan, tmp_path):
    done = command(
        "train", "--scan", scan, "--output", tmp_path / "out", "--sweep", "seed=12345678,12345679"
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "seed=12345678",
        "seed=12345679",
        "sweep.json",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: [m], "must hold a JSON object, got list"),
        (lambda m: {**m, "hidden_size": "32"}, "hidden_size must be an integer in"),
        (lambda m: {**m, "shards": 1.5}, "shards must be an integer in"),
        (lambda m: {**m, "shards": 10**12}, "shard-000002.safetensors is not a whole shard"),
        (lambda m: {**m, "share": 0}, "share must be in (0, 1], got 0"),
        (lambda m: {**m, "settings": None}, "settings must be an object, got None"),
        (lambda m: {**m, "counts": {}}, "examples must be an integer in"),
        (lambda m: {**m, "lm_head": 3}, "lm_head must be text, got 3"),
        (lambda m: {**m, "hidden_size": 33}, "its tensors are not those of width 33"),
        (
            lambda m: {k: v for k, v in m.items() if k != "format"},
            "format must be 2, as this version writes it, got None",
        ),
        (lambda m: {**m, "format": 1}, "format must be 2, as this version writes it, got 1"),
    ],
)
def test_odd_manifests_are_one_line(scan, head, tmp_path, change, words):
    folder = shutil.copytree(scan, tmp_path / "scan")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(change(manifest)))
    for done in (
        command("train", "--scan", folder, "--output", tmp_path / "out"),
        command("calibrate", "--head", head, "--scan", folder),
        command("report", "--head", head, "--scan", folder, "--output", tmp_path / "out"),
    ):
        assert_refuses(done, words if words.split()[0] in done.stderr else "head has width 32")
    assert not (tmp_path / "out").exists()


def test_shards_that_hold_nan_are_refused(scan, head, tmp_path):
    folder = shutil.copytree(scan, tmp_path / "scan")
    tensors = load_file(shard_path(folder, 1))
    with safe_open(shard_path(folder, 1), "pt") as file:
        metadata = file.metadata()
    tensors["gap"][3] = float("nan")
    save_file(tensors, shard_path(folder, 1), metadata=metadata)
    done = command("calibrate", "--head", head, "--scan", folder, "--alpha", 0.4)
    assert_refuses(done, "shard-000001.safetensors is not a whole shard", "it holds NaN")
    assert TemperatureHead.from_pretrained(head).offset == 0.0


def test_reports_of_folders_of_one_name_are_refused(scan, head, tmp_path):
    other = shutil.copytree(scan, tmp_path / "other" / scan.name)
    done = command(
        "report", "--head", head, "--scan", scan, "--scan", other, "--output", tmp_path / "out"
    )
    assert_refuses(done, "scans are named by their folders, which must differ, got scan, scan")


def test_demo_texts(tmp_path):
    one, empty = tmp_path / "one.txt", tmp_path / "empty.txt"
    one.write_text("x")
    empty.write_text(" \n")
    out = ("--output", tmp_path / "out")
    assert_refuses(command("demo", "--text", one, *out), "at least 2 files", "got 1")
    assert_refuses(command("demo", "--text", one, "--text", empty, *out), "empty.txt holds no text")
    assert_refuses(
        command("demo", "--text", one, "--text", tmp_path / "no", *out), "cannot be read"
    )
    assert not (tmp_path / "out").exists()
