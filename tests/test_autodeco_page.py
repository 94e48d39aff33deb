"""docs/autodeco.md: its tables name what there is, its command trains, what it says of launchers is
so."""

import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import accelerate
import pytest
import torch
import typer

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.cli import app
from autodeco_fast.policies import parse
from autodeco_fast.training.processes import start_accelerator
from tests.commands import ROOT, assert_refuses, command, save_tiny

PAGE = (ROOT / "docs/autodeco.md").read_text()
FSDP = """\
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
machine_rank: 0
mixed_precision: bf16
num_machines: 1
num_processes: 2
use_cpu: true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("page") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "rows.jsonl"
    lines = [
        {"prompt": f"w{i} w{i + 1}", "completion": " ".join(f" w{i + k}" for k in range(2 + i % 3))}
        for i in range(2, 14)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tables(header: str) -> list[list[str]]:
    """The cells of every row below a header that begins so."""
    found, inside = [], False
    for line in PAGE.splitlines():
        inside = line.startswith("|") and (inside or line.startswith(header))
        if inside and not line.startswith(header) and not line.startswith("|--"):
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def options(cell: str) -> list[str]:
    return re.findall(r"--[a-z0-9_-]+", cell)


def test_the_options_of_the_tables_are_there():
    known = {o for p in typer.main.get_command(app).commands["train"].params for o in p.opts}
    flags = tables("| flag")
    assert len(flags) > 35
    for there, here, *_ in flags:
        assert options(there), there
        assert here == "none" or options(here), here
        assert set(options(here)) <= known, here
    for switch, _ in tables("| option of `train`"):
        assert set(options(switch)) <= known
    mapped = {flag for there, *_ in flags for flag in options(there)}
    script = """--model_name_or_path --dataset_name --max_length --per_device_train_batch_size
        --per_device_eval_batch_size --gradient_accumulation_steps --torch_dtype
        --completion_only_loss --learning_rate --num_train_epochs --gradient_checkpointing
        --logging_steps --output_dir --save_strategy --attn_implementation --save_only_model
        --train_temp --train_top_p --report_to --goldilocks_filter --goldilocks_easy_frac
        --goldilocks_topk --max_steps --save_steps --bf16"""
    assert set(script.split()) <= mapped


def test_the_tests_it_names_are_there():
    named = {
        name for *_, cell in tables("| what happened") for name in re.findall(r"test_\w+", cell)
    }
    assert len(named) > 8
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in named:
        assert f"def {name}(" in source, name


def translated(model, rows, output) -> list[str]:
    """The page's translation of AutoDeco's script, for another model and data."""
    (line,) = re.findall(r"^\$ autodeco-fast (train --objective autodeco_joint .*)$", PAGE, re.M)
    words = shlex.split(line)
    for name, value in (("--model", model), ("--data", rows), ("--output", output)):
        words[words.index(name) + 1] = str(value)
    return words


def test_the_scripts_command_trains_heads_that_generate(tmp_path, model, rows):
    done = command(*translated(model, rows, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]  # 12 examples, 4 a step
    assert lines[0]["learning_rate"] == 5e-6
    assert lines[-1]["learning_rate"] == pytest.approx(5e-6 / 3)
    assert TemperatureHead.from_pretrained(tmp_path / "out").min_p == 1e-6
    assert TopPHead.from_pretrained(tmp_path / "out/top_p_head").use_enhanced_features
    policy = parse(f"autodeco={tmp_path / 'out'}")
    assert policy.head is not None
    assert policy.top_p_head is not None
    words = ("--model", model, "--head", tmp_path / "out", "--prompt", "w5 w6")
    done = command("generate", *words, "--max-new-tokens", 3, "--seed", 0)
    assert done.returncode == 0, done.stderr


def test_options_may_have_underscores_in_every_command():
    assert "No such option: --no-such" in command("train", "--no_such", "1").stderr
    assert (
        "rounds must be at least 1"
        in command(
            "train", "--objective", "rewards", "--output", "x", "--model", "m", "--rounds=0"
        ).stderr
    )
    assert command("sample_text", "--help").returncode == 0


@pytest.mark.slow
def test_two_processes_with_an_fsdp_config_do_what_one_does(tmp_path, model, rows):
    """accelerate launch, gloo, two batches a process a step, against one process's four; a batch is
    one example, so that hidden states are the same bits."""
    config = tmp_path / "fsdp.yaml"
    config.write_text(FSDP)
    shared = ["train", "--objective", "autodeco_joint", "--model", str(model), "--data", str(rows)]
    shared += ["--learning_rate", "1e-2", "--max_grad_norm", "0.02", "--output"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    one_each = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    done = subprocess.run(
        [*launch, "-m", "autodeco_fast", *shared, str(tmp_path / "two"), *one_each],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 × cpu" in done.stderr + done.stdout
    assert done.stderr.count("FSDP shards nothing here") == 1
    one_each[-1] = "4"
    alone = command(*shared, tmp_path / "one", *one_each)
    assert alone.returncode == 0, alone.stderr
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    for two, one in zip(*metrics, strict=True):
        assert two["selected_tokens"] == one["selected_tokens"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for kind, name in ((TemperatureHead, ""), (TopPHead, "top_p_head")):
        heads = [kind.from_pretrained(tmp_path / run / name) for run in ("two", "one")]
        for a, b in zip(*(head.parameters() for head in heads)):
            # Sums of halves round otherwise: by 3e-8, a unit in the last place, where it was tried.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_deepspeed_that_is_not_installed_is_refused(tmp_path, model, rows, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    done = command("train", "--model", model, "--data", rows, "--output", tmp_path / "out")
    assert_refuses(
        done, "accelerate cannot start as it was configured", "DeepSpeed is not installed"
    )
    assert not (tmp_path / "out").exists()


def test_weights_taken_apart_are_refused(monkeypatch):
    plugin = SimpleNamespace(zero_stage=3)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    started = SimpleNamespace(state=state, is_main_process=True)
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: started)
    with pytest.raises(ValueError, match="DeepSpeed's zero_stage must be 0, 1 or 2, got 3: it tak"):
        start_accelerator()
    plugin.zero_stage = 2
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.warns(UserWarning, match="DEEPSPEED shards nothing here: every process holds"):
        assert start_accelerator() is started
