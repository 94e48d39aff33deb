"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.demo import EMBEDDED_MODEL


def run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "autodeco_fast", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def assert_refuses(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr


@pytest.fixture
def head(tmp_path):
    torch.manual_seed(0)
    TemperatureHead(256).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_doctor_finds_everything_well():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count(" ok") >= 9


def test_generate_continues_the_prompt(head):
    options = ("--model", EMBEDDED_MODEL, "--head", head, "--prompt", "def area(", "--max-new-tokens", 12, "--seed", 1)
    done = run("generate", *options)
    assert done.returncode == 0, done.stderr
    assert "def area(" in done.stdout
    assert len(done.stdout.strip()) > len("def area(")
    assert run("generate", *options).stdout == done.stdout


def test_bad_input_is_one_line(head, tmp_path):
    prompt = ("--prompt", "x")
    done = run("generate", "--model", EMBEDDED_MODEL, "--head", head, *prompt, "--min-p", 0)
    assert_refuses(done, "min_p must be in (0, 1], got 0.0")
    assert_refuses(run("generate", "--model", EMBEDDED_MODEL, "--head", tmp_path / "no", *prompt), "which is no folder")
    assert_refuses(run("generate", "--model", tmp_path / "no", "--head", head, *prompt), "model must be a folder")
    TemperatureHead(8).save_pretrained(tmp_path / "narrow")
    done = run("generate", "--model", EMBEDDED_MODEL, "--head", tmp_path / "narrow", *prompt)
    assert_refuses(done, "head has width 8", "takes 256")
    (head / "head.safetensors").write_bytes(b"not tensors")
    done = run("generate", "--model", EMBEDDED_MODEL, "--head", head, *prompt)
    assert_refuses(done, "is not a safetensors file")
    one = tmp_path / "one.txt"
    one.write_text("x")
    assert_refuses(run("demo", "--text", one, "--output", tmp_path / "out"), "at least 2 files", "got 1")
    assert not (tmp_path / "out").exists()


def test_train_writes_a_head_that_generates(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "import os\n", "completion": f"x = {k}\n" * 20}) + "\n" for k in range(8)))
    done = run("train", "--model", EMBEDDED_MODEL, "--data", data, "--output", tmp_path / "head", "--num-train-epochs", 2)
    assert done.returncode == 0, done.stderr
    assert "8 rows of 8 have a target" in done.stderr
    assert len((tmp_path / "head/metrics.jsonl").read_text().splitlines()) == 4
    prompt = ("--prompt", "x = 1", "--max-new-tokens", 4)
    assert run("generate", "--model", EMBEDDED_MODEL, "--head", tmp_path / "head", *prompt).returncode == 0
    done = run("train", "--model", EMBEDDED_MODEL, "--data", data, "--output", tmp_path / "head")
    assert_refuses(done, "holds a head already")


def test_train_reads_the_data_before_the_model(tmp_path):
    """The model does not exist, and the complaint is about the data."""
    options = ("--model", tmp_path / "no-model", "--output", tmp_path / "out")
    data = tmp_path / "rows.jsonl"
    assert_refuses(run("train", *options, "--data", data), "which is no file")
    data.write_text('{"text": "a"}\n{"text": ')
    assert_refuses(run("train", *options, "--data", data), "rows.jsonl, line 2: not JSON")
    assert_refuses(run("train", *options, "--data", data, "--min-p", 1.5), "min_p must be in (0, 1), got 1.5")
    data.write_text('{"text": "a"}\n')
    assert_refuses(run("train", *options, "--data", data), "model must be a folder or a hub id")
    assert not (tmp_path / "out").exists()
