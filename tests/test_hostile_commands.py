"""Hostile files and options: they are served, or refused in one line.

A command that refuses says why on standard error and returns 2; whatever it leaves in the output
folder is whole. Anything else that is raised is a bug.

`FUZZ_SECONDS=100 pytest tests/test_hostile_commands.py` goes on for so many seconds a test, on
other examples every time.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import strategies as st
from safetensors import safe_open

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.scan_store import MANIFEST, shard_path
from tests.commands import Done, command, save_tiny
from tests.hostile import search
from tests.hostile_files import (
    YAML_JUNK,
    json_changes,
    jsonl,
    odd_json,
    odd_tensors,
    tensor_changes,
)
from tests.scans import write_examples

EXAMPLES = 12


def hostile(strategy: st.SearchStrategy, check: Callable) -> None:
    """Calls `check` with examples."""
    search(strategy, check, EXAMPLES, fuzzed=50)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a model, data, a scan of it in two shards, and a head: nothing is wrong."""
    folder = tmp_path_factory.mktemp("good")
    save_tiny(folder / "model")
    write_examples(folder / "rows.jsonl", 12)
    reads = ("--model", folder / "model", "--data", folder / "rows.jsonl")
    options = ("--output", folder / "scan", "--examples-per-shard", 6, "--all-tokens")
    assert command("scan", *reads, *options).returncode == 0
    TemperatureHead(32, 8, min_p=0.05).save_pretrained(folder / "head")
    return folder


def whole(path: Path) -> bool:
    """Whether a file that a command left is all there."""
    if path.name == ".lock" or path.name.endswith(".tmp"):
        return False
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118 -- not a dict
    if path.suffix == ".json":
        json.loads(path.read_text())
    if path.suffix == ".jsonl":
        assert path.read_text().endswith("\n") or not path.read_text()
        [json.loads(line) for line in path.read_text().splitlines()]
    return True


def held(done: Done, output: Path, refused: tuple[str, ...] = ()) -> None:
    """The rule at the top; `refused` names files that only a served command leaves."""
    assert done.returncode in (0, 2), done
    lines = done.stderr.strip().splitlines()
    complaints = [line for line in lines if line.startswith("error: ")]
    assert len(complaints) == (done.returncode == 2), done.stderr
    assert complaints in ([], lines[-1:]), done.stderr
    left = [path for path in output.rglob("*") if path.is_file()]
    assert all(map(whole, left)), left
    assert not list(output.rglob("*.tmp"))
    if done.returncode:
        assert not {path.name for path in left} & set(refused)


def test_rows(good):
    def check(example):
        name, data = example
        with TemporaryDirectory() as folder:
            rows, output = Path(folder, "rows.jsonl"), Path(folder, "out")
            rows.write_bytes(data)
            done = command(name, "--model", good / "model", "--data", rows, "--output", output)
            held(done, output, (CONFIG_NAME,))

    hostile(st.tuples(st.sampled_from(["train", "scan"]), jsonl), check)


# Long runs are no failure, so these take small numbers, or none at all.
_LONG = (
    "num-train-epochs",
    "max-steps",
    "gradient-accumulation-steps",
    "save-steps",
    "diagnostics",
)
option_values = st.sampled_from(
    [
        *("0", "1", "-1", "2", "0.5", "1e-3", "inf", "nan", "-inf", "1e400", "1e30", "1e-320"),
        *("", " ", "x", "٣", "1_000", "0x10", "true", "None", "\udc80", "[/red]", "2G"),
        *map(str, (2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1)),
    ]
)
small_values = st.sampled_from(
    ["0", "1", "-1", "2", "0.5", "inf", "nan", "", "x", str(2**63), str(-(2**63) - 1)]
)


def _options(config: type, *but: str) -> list[str]:
    """The options of a command, without those of a good call."""
    return [field.name.replace("_", "-") for field in fields(config) if field.name not in but]


_SCAN = _options(ScanConfig, "model", "output", "all_tokens")
_TRAIN = [*_options(TrainConfig, "output", "scan", "model", "data", "resume"), "sweep"]
_OPTIONS = {
    "scan": _SCAN,
    "train": _TRAIN,
    "scanned": _TRAIN,
    "calibrate": ["alpha", "min-p"],
    "report": ["min-p", "model"],
    "generate": ["min-p", "seed", "max-new-tokens", "prompt"],
    "sample-text": ["temperature", "min-p", "seed", "batch-size", "prompts"],
}
_axis = st.tuples(
    st.sampled_from(["gravity", "min_p", "seed", "power", ""]), st.lists(option_values, max_size=2)
).map(lambda axis: f"{axis[0]}={','.join(axis[1])}")


def value_of(name: str) -> st.SearchStrategy:
    """What to give an option."""
    if name == "sweep":
        return st.lists(_axis, max_size=2).map(" ".join)
    if name in ("objective", "lr-scheduler-type"):
        choices = ["autodeco_joint", "autodeco_temperature", "label_free", "constant"]
        return option_values | st.sampled_from(choices)
    return small_values if name in _LONG else option_values


def named_values(names: list[str]) -> st.SearchStrategy:
    """Some of these options, with their values."""
    one = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), value_of(name)))
    return st.lists(one, min_size=1, max_size=4, unique_by=lambda pair: pair[0])


def arguments_of(name: str, good: Path, head: Path, output: Path) -> list:
    """Of a command that would be served; "scanned" trains from a scan."""
    reads = ["--model", good / "model", "--data", good / "rows.jsonl"]
    judges = ["--head", head, "--scan", good / "scan"]
    given = {
        "scan": ["scan", *reads, "--output", output],
        "train": ["train", *reads, "--output", output],
        "scanned": ["train", "--scan", good / "scan", "--output", output],
        "calibrate": ["calibrate", *judges, "--alpha", "0.4"],
        "report": ["report", *judges, "--output", output],
        "sample-text": ["sample-text", *reads[:2], "--output", output / "text.jsonl"]
        + ["--number", "3", "--max-new-tokens", "2"],
        "generate": ["generate", *reads[:2], "--head", head, "--prompt", "w5"]
        + ["--max-new-tokens", "2"],
    }
    return given[name]


def test_options(good):
    def check(example):
        name, options = example
        with TemporaryDirectory() as folder:
            head, output = shutil.copytree(good / "head", Path(folder, "head")), Path(folder, "out")
            before = (head / CONFIG_NAME).read_bytes()
            given = [f"--{option}={value}" for option, value in options]
            done = command(*arguments_of(name, good, head, output), *given)
            if name == "calibrate":
                held(done, head)
            else:  # a refused sweep keeps the heads of the points before
                held(done, output, () if "sweep" in dict(options) else (CONFIG_NAME,))
            if done.returncode:
                assert (head / CONFIG_NAME).read_bytes() == before

    some = st.sampled_from(sorted(_OPTIONS))
    hostile(
        some.flatmap(lambda name: st.tuples(st.just(name), named_values(_OPTIONS[name]))), check
    )


def test_settings_in_yaml(good):
    def check(text):
        with TemporaryDirectory() as folder:
            path, output = Path(folder, "run.yaml"), Path(folder, "out")
            path.write_bytes(text)
            held(
                command("train", "--scan", good / "scan", "--output", output, "--config", path),
                output,
                (CONFIG_NAME,),
            )

    names = [name.replace("-", "_") for name in _TRAIN if name not in (*_LONG, "sweep")]
    special = ["", "~", "2024-01-01", "[1]", "{a: 1}", "!!bool b", "&a [*a]", "yes"]
    special += ["'1e-3'", "1:30"]
    written = option_values | st.sampled_from(special)
    keys = st.sampled_from([*names, "2", "", "[a]", "? b"])
    entry = st.tuples(keys, written).map(lambda e: f"{e[0]}: {e[1]}")
    text = st.lists(entry, max_size=4).map(lambda x: "\n".join(x).encode("utf-8", "surrogatepass"))
    hostile(text | YAML_JUNK, check)


HEAD_PATHS = [
    (name,)
    for name in (
        *("hidden_size", "intermediate_size", "max_temperature"),
        *("offset", "min_p", "more"),
    )
]


def test_heads(good):
    def check(example):
        name, config, tensors = example
        with TemporaryDirectory() as folder:
            head, output = shutil.copytree(good / "head", Path(folder, "head")), Path(folder, "out")
            if config is not None:
                (head / CONFIG_NAME).write_bytes(odd_json((head / CONFIG_NAME).read_text(), config))
            if tensors is not None:
                odd_tensors(head / WEIGHTS_NAME, tensors)
            before = (head / CONFIG_NAME).read_bytes()
            done = command(*arguments_of(name, good, head, output))
            held(done, output)
            if done.returncode:
                assert (head / CONFIG_NAME).read_bytes() == before

    names = st.sampled_from(["generate", "calibrate", "calibrate", "report"])
    hostile(
        st.tuples(names, st.none() | json_changes(HEAD_PATHS), st.none() | tensor_changes), check
    )


MANIFEST_PATHS = [
    *[(name,) for name in ("format", "settings", "revision", "hidden_size", "lm_head")],
    *[(name,) for name in ("tokenizer", "data", "share", "shards", "tokens", "counts")],
    *[("settings", name) for name in ("model", "all_tokens", "seed", "easy_fraction")],
    *[("counts", name) for name in ("examples", "seen", "trivial")],
]


def test_scans(good):
    def check(example):
        name, manifest, tensors = example
        with TemporaryDirectory() as folder:
            copy = Path(folder)
            for name_of_copy in ("head", "scan"):
                shutil.copytree(good / name_of_copy, copy / name_of_copy)
            for name_of_link in ("model", "rows.jsonl"):
                (copy / name_of_link).symlink_to(good / name_of_link)
            output = copy / ("scan" if name == "scan" else "out")
            path, head = copy / "scan" / MANIFEST, copy / "head"
            if manifest is not None:
                path.write_bytes(odd_json(path.read_text(), manifest))
            if tensors is not None:
                odd_tensors(shard_path(copy / "scan", 1), tensors)
            before = (head / CONFIG_NAME).read_bytes()
            done = command(*arguments_of(name, copy, head, output))
            held(done, copy / "out", (CONFIG_NAME,))
            if done.returncode:
                assert (head / CONFIG_NAME).read_bytes() == before

    names = st.sampled_from(["scanned", "calibrate", "report", "scan"])
    hostile(
        st.tuples(names, st.none() | json_changes(MANIFEST_PATHS), st.none() | tensor_changes),
        check,
    )


def test_the_rule_would_tell(tmp_path):
    """The control: tracebacks, other exit codes, several lines, half-written files."""
    rule = partial(held, output=tmp_path)
    rule(Done(0, "", "fine\n"))
    rule(Done(2, "", "error: no\n"))
    for done in (
        Done(1, "", "error: no\n"),
        Done(2, "", "error: no\nerror: no\n"),
        Done(2, "", ""),
        Done(0, "", "error: no\n"),
    ):
        with pytest.raises(AssertionError):
            rule(done)
    (tmp_path / "head.safetensors").write_bytes(b"half")
    with pytest.raises(Exception, match="header"):
        rule(Done(2, "", "error: no\n"))
