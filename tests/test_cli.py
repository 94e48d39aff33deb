"""The command line as a user meets it."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from autodeco_fast import TemperatureHead, __version__
from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training import base_model
from autodeco_fast.training.scan import lm_head_fingerprint
from tests.checkpoint_folders import chat_model
from tests.commands import ROOT, Done, assert_refuses, command, listing
from tests.forked import on_two_processes
from tests.scans import write_examples


def process(*arguments: object) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "autodeco_fast", *map(str, arguments)],
        capture_output=True,
        timeout=120,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def test_doctor_finds_everything_well():
    done = command("doctor")
    assert done.returncode == 0, done.stderr
    assert "FAILED" not in done.stdout
    assert done.stdout.count(" ok") >= 9


def test_a_process_says_its_version():
    assert process("--version").stdout == f"autodeco-fast {__version__}\n"


_MODEL_AND_DATA = ("--model", "m", "--data", "d")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("demo", "--seed", "x"), "Invalid value for '--seed'"),
        (("doctor", "--nothing"), "No such option: --nothing"),
        (("scan", *_MODEL_AND_DATA, "--output", "o", "--max-bytes", "2X"), "a size must be"),
        (("train", *_MODEL_AND_DATA), "output must name a new folder"),
        (("calibrate", "--head", "h"), "Missing option '--scan'"),
        (("report", "--head", "h", "--scan", "s"), "Missing option '--output'"),
        (("eval", *_MODEL_AND_DATA[:2], "--prompts", "p", "--scorer", "exact", "--output", "o"),
         "prompts must be a JSONL file, got 'p', which is no file"),
        (("generate", *_MODEL_AND_DATA[:2], "--head", "h", "--prompt", "p", "--min-p", "0"),
         "min_p must be in (0, 1], got 0.0"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_process_says_what_is_wrong(arguments, words):
    """Once a command: the other tests of refusals stay in this process."""
    assert_refuses(process(*arguments), words)


def test_what_is_no_scan_is_refused(tmp_path):
    done = command("train", "--output", tmp_path / "out", "--scan", tmp_path)
    assert_refuses(done, "scan must be a folder with scan.json")
    assert not (tmp_path / "out").exists()


def test_a_bug_stays_a_traceback(monkeypatch):
    def buggy(**options):
        raise KeyError("bug")

    monkeypatch.setattr("autodeco_fast.demo.run_demo", buggy)
    with pytest.raises(KeyError):
        command("demo")


def test_usage_errors_are_one_line():
    assert_refuses(command("nothing"), "No such command 'nothing'")
    assert_refuses(command("train", "--nothing"), "No such option: --nothing")
    assert_refuses(command("generate", "--model", "m"), "Missing option '--head'")
    assert_refuses(command("train", "--min-p", "abc"), "Invalid value for '--min-p'")
    assert_refuses(command("generate", "--seed", 2**64), "Invalid value for '--seed'")


def test_help_is_short_where_ranges_and_lines_are_long(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # wider than a paragraph of the source
    assert "before any model is loaded. Options may be written with" in command("--help").stdout
    assert "again. For several devices: `accel" in command("eval", "--help").stdout
    for name in ("demo", "generate", "construct"):
        shown = command(name, "--help").stdout
        assert "--seed" in shown
        assert str(2**63) not in shown


def test_generate_continues_the_prompt(tmp_path):
    TemperatureHead(256).save_pretrained(tmp_path / "head")
    options = ("--model", EMBEDDED_MODEL, "--head", tmp_path / "head")
    options += ("--prompt", "def area(", "--max-new-tokens", 12)
    done = command("generate", *options, "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert "def area(" in done.stdout
    assert len(done.stdout.strip()) > len("def area(")
    assert command("generate", *options, "--seed", 1).stdout == done.stdout


def test_generate_takes_the_heads_min_p(model, tmp_path):
    """At Min-P near 1 only the argmax is left: the head's cut shows, and a given one wins."""
    head = TemperatureHead(32, max_temperature=50.0)
    options = ("--model", model, "--head", tmp_path / "head")
    options += ("--prompt", "w5", "--max-new-tokens", 8)
    said = {}
    for cut in (0.9999, 1e-6):
        head.min_p = cut
        head.save_pretrained(tmp_path / "head")
        said[cut] = {command("generate", *options, "--seed", seed).stdout for seed in range(3)}
    assert len(said[0.9999]) == 1
    assert len(said[1e-6]) == 3
    options += ("--min-p", 0.9999)
    again = {command("generate", *options, "--seed", seed).stdout for seed in range(3)}
    assert again == said[0.9999]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--min-p": 0}, "min_p must be in (0, 1], got 0.0"),
        ({"--min-p": "nan"}, "min_p must be in (0, 1], got nan"),
        ({"--head": "no/where/here"}, "which is no folder"),
        ({"--model": "no/where/here"}, "model must be a folder"),
        ({"--model": "nobody/nothing"}, "model must be a folder or a hub id"),
        ({"--prompt": ""}, "prompt must hold a token of the model, got ''"),
        ({"--prompt": "w5 \udc80"}, "prompt must be Unicode, got a lone surrogate"),
        (
            {"--max-new-tokens": 10**9},
            "the model has 256 positions, got 1 tokens of the prompt and max_new_tokens 1000000000",
        ),
        ({"--max-new-tokens": 0}, "Invalid value for '--max-new-tokens'"),
        ({"--scale": 0}, "scale must be positive, got 0.0"),
        ({"--t-min": 2, "--t-max": 1}, "t_max must be ≥ t_min 2.0, got 1.0"),
        ({"--chat": None}, "chat needs a chat template, which the model's tokenizer has not"),
    ],
)
def test_generate_refuses_in_one_line(model, head, options, words):
    given = {"--model": model, "--head": head, "--prompt": "w5", **options}
    arguments = [each for each in chain(*given.items()) if each is not None]
    assert_refuses(command("generate", *arguments), words)


def test_generate_answers_a_message_without_special_tokens(model, head, tmp_path):
    """At a temperature of 0 what is printed is the model's greedy answer to the chat's ids."""
    turn, answer = "w7 {{ m.content }} <s> ", "w8"
    folder, tokenizer = chat_model(model, tmp_path / "model", turn=turn, answer=answer)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor([tokenizer("w7 w5 <s> w8").input_ids])
    greedy = base.generate(ids, do_sample=False, max_new_tokens=8)[0]
    options = ("--model", folder, "--head", head, "--prompt", "w5", "--max-new-tokens", 8)
    asked = command("generate", *options, "--chat", "--t-max", 0)
    assert asked.returncode == 0, asked.stderr
    answer = tokenizer.decode(greedy[ids.shape[1] :], skip_special_tokens=True)
    assert asked.stdout.split() == answer.split()
    scaled = command("generate", *options, "--chat", "--scale", 1e-9)  # T < 1e-3 is greedy, too
    assert scaled.stdout == asked.stdout
    prompt = ("--prompt", "w7 w5 <s> w8", "--t-max", 0)
    assert "<s>" not in command("generate", *options[:4], *prompt).stdout


def test_generate_refuses_a_head_of_another_model(model, head):
    """As `eval` does: its width says nothing."""
    settings = head / "training.json"
    options = ("generate", "--model", model, "--head", head, "--prompt", "w5")
    settings.write_text('{"lm_head": "another"}')
    assert_refuses(command(*options), str(head), "was trained for another model")
    own = lm_head_fingerprint(base_model.load(str(model), torch.bfloat16))
    settings.write_text(json.dumps({"lm_head": own}))
    assert command(*options, "--max-new-tokens", 2).returncode == 0


def test_generate_runs_on_the_gpu_that_is_there(model, head, monkeypatch):
    moved = []
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, device: moved.append(device))
    options = ("--model", model, "--head", head, "--prompt", "w5", "--max-new-tokens", 2)
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert command("generate", *options).returncode == 0
    assert moved == ["cpu", "cuda"]


def commands_that_write(model, scan, head, rows, output) -> dict[str, tuple]:
    texts = [rows.parent / f"{name}.txt" for name in "ab"]
    for path in texts:
        path.write_text("def f(x):\n    return x\n")
    return {
        "scan": ("--model", model, "--data", rows, "--output", output),
        "train": ("--scan", scan, "--output", output),
        "report": ("--head", head, "--scan", scan, "--output", output),
        "demo": ("--text", texts[0], "--text", texts[1], "--output", output),
    }


@contextmanager
def no_more_than(size: int):
    """Files of this process may not grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["scan", "train", "report", "demo"])
def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    model, scan, head, tmp_path, monkeypatch, name
):
    def no_work(*args, **options):
        raise AssertionError("a model was loaded, or a shard was read")

    rows = write_examples(tmp_path / "rows.jsonl", 4)
    monkeypatch.setattr("autodeco_fast.training.base_model.load_causal_lm", no_work)
    monkeypatch.setattr("autodeco_fast.training.scan_store.ScanTokens.__init__", no_work)
    monkeypatch.setattr("autodeco_fast.training.report.scanned_model", no_work)
    file = tmp_path / "file"
    file.write_text("mine")
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    read_only.chmod(0o500)
    cases = [
        (file, "output must be a folder"),
        (file / "below", "cannot be written"),
        (Path("/proc/below"), "cannot be written"),
    ]
    if os.geteuid() != 0:  # root writes anywhere
        cases.append((read_only, "cannot be written"))
    for output, words in cases:
        assert_refuses(
            command(name, *commands_that_write(model, scan, head, rows, output)[name]), words
        )
    arguments = commands_that_write(model, scan, head, rows, tmp_path / "new" / "folder")[name]
    with no_more_than(100_000):
        assert_refuses(command(name, *arguments), "cannot be written", os.strerror(errno.ENOSPC))
    assert file.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_a_head_that_cannot_be_written_is_not_calibrated(scan, head, tmp_path):
    before = listing(head)
    with no_more_than(100_000):
        assert_refuses(
            command("calibrate", "--head", head, "--scan", scan, "--alpha", 0.4),
            "head",
            "cannot be written",
        )
    assert listing(head) == before
    assert_refuses(
        command("calibrate", "--head", tmp_path / "no", "--scan", scan), "head must be a folder"
    )
    assert not (tmp_path / "no").exists()


HOLDS = """
import sys, time
from pathlib import Path
from autodeco_fast.files import output_folder
with output_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_into_one_folder_cannot_both_go_on(scan, tmp_path):
    output = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(output)], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        arguments = ("train", "--scan", scan, "--output", output)
        assert_refuses(command(*arguments), "is being written by another run")
    finally:
        holder.kill()  # its lock goes with it
        holder.wait()
        holder.stdout.close()
    assert command(*arguments).returncode == 0
    assert not (output / ".lock").exists()


@pytest.mark.slow
def test_the_processes_of_one_run_share_its_folder(scan, tmp_path):
    """Only the first holds it."""
    words = ["train", "--scan", str(scan), "--output", str(tmp_path / "out")]
    done = on_two_processes(f"from autodeco_fast.cli import run\nraise SystemExit(run({words!r}))")
    assert done.returncode == 0, done.stderr
    TemperatureHead.from_pretrained(tmp_path / "out")
    assert not (tmp_path / "out/.lock").exists()


def test_train_writes_a_head_that_generates(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": "import os\n", "completion": f"x = {k}\n" * 20}) + "\n"
            for k in range(8)
        )
    )
    options = ("--model", EMBEDDED_MODEL, "--data", data, "--output", tmp_path / "head")
    done = command("train", *options, "--num-train-epochs", 2, "--min-p", 0.05)
    assert done.returncode == 0, done.stderr
    assert "8 examples of 8 have a target" in done.stderr
    few = "only 4 steps: raise --num-train-epochs, or lower --per-device-train-batch-size\n"
    assert few in done.stderr
    assert len((tmp_path / "head/metrics.jsonl").read_text().splitlines()) == 4
    assert TemperatureHead.from_pretrained(tmp_path / "head").min_p == 0.05
    prompt = ("--prompt", "x = 1", "--max-new-tokens", 4)
    done = command("generate", "--model", EMBEDDED_MODEL, "--head", tmp_path / "head", *prompt)
    assert done.returncode == 0
    assert_refuses(command("train", *options), "holds a head already")


def test_a_finished_run_has_nothing_to_resume(scan, tmp_path):
    arguments = ("train", "--scan", scan, "--output", tmp_path / "out")
    assert command(*arguments).returncode == 0
    before = listing(tmp_path / "out")
    done = command(*arguments, "--resume")
    assert done.returncode == 0
    assert "is finished: there is nothing to resume" in done.stderr
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("rate", ["inf", "nan", "-inf", "1e400"])
def test_a_rate_that_is_not_finite_is_refused(scan, tmp_path, rate):
    arguments = ("train", "--scan", scan, "--output", tmp_path / "out", "--learning-rate", rate)
    assert_refuses(command(*arguments), "learning_rate must be a finite number, got")


def test_a_loss_that_is_not_finite_stops_the_run(scan, tmp_path):
    arguments = ("train", "--scan", scan, "--output", tmp_path / "out")
    arguments += ("--num-train-epochs", 40, "--batch-tokens", 50, "--save-steps", 1)
    done = command(*arguments, "--learning-rate", 1e30, "--warmup-ratio", 0)
    assert done.returncode == 2
    assert "no head is written" in done.stderr or "must be finite" in done.stderr
    assert not (tmp_path / "out/head.safetensors").exists()
    for path in (tmp_path / "out").rglob("*.safetensors"):  # of checkpoints before it
        assert all(t.isfinite().all() for t in load_file(path).values())


def test_calibrate_stores_its_cut_and_warns_of_another(scan, head):
    stored = TemperatureHead.from_pretrained(head)
    stored.min_p = 1e-4
    stored.save_pretrained(head)
    done = command("calibrate", "--head", head, "--scan", scan, "--alpha", 0.4)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert TemperatureHead.from_pretrained(head).min_p == 1e-4
    done = command("calibrate", "--head", head, "--scan", scan, "--alpha", 0.4, "--min-p", 1e-5)
    assert done.returncode == 0, done.stderr
    warning = "warning: the head was made for Min-P 0.0001: at 1e-05 nothing was promised of it"
    assert warning in done.stderr
    assert TemperatureHead.from_pretrained(head).min_p == 1e-5
    assert json.loads((head / "calibration.json").read_text())["min_p"] == 1e-5


def test_paths_are_not_markup(scan, tmp_path):
    output = tmp_path / "[bold]x[" / "[red]" / "y"
    done = command("train", "--scan", scan, "--output", output)
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stderr
    assert_refuses(
        command("train", "--scan", tmp_path / "[" / "red]", "--output", tmp_path / "out"), "[/red]"
    )
