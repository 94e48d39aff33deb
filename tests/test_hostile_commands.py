"""Hostile files and options: a command serves them, or says in one line on standard error why not
and returns 2; whatever it leaves in the output folder is whole. Anything else that is raised is a
bug.

`FUZZ_SECONDS=100 pytest tests/test_hostile_commands.py` goes on for so many seconds a test, on
other examples every time.
"""

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from autodeco_fast.training.scan_store import MANIFEST, shard_path
from tests.commands import Done, command, save_tiny
from tests.scans import write_examples

SECONDS = float(os.environ.get("FUZZ_SECONDS", 0))
EXAMPLES = 12


def hostile(strategy, check) -> None:
    """Calls `check` with examples."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    if not SECONDS:
        settings(max_examples=EXAMPLES, derandomize=True, **options)(given(strategy)(check))()
        return
    start = time.monotonic()
    while time.monotonic() < start + SECONDS:
        run = settings(max_examples=50, derandomize=False, **options)(
            given(strategy)(lambda example: check(example))
        )
        seed(time.monotonic_ns())(run)()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a model, rows, a scan of them in two shards, and a head; nothing is wrong with
    them."""
    folder = tmp_path_factory.mktemp("good")
    save_tiny(folder / "model")
    write_examples(folder / "rows.jsonl", 12)
    options = (
        "--data",
        folder / "rows.jsonl",
        "--output",
        folder / "scan",
        "--rows-per-shard",
        6,
        "--all-tokens",
    )
    assert command("scan", "--model", folder / "model", *options).returncode == 0
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


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30]),
    st.floats(),
    st.sampled_from(
        ["", " ", "1e-3", "2G", "a", "\ud800", "[red]", "32", "none", "../x", "\x00", "é\u2028"]
    ),
)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
)
junk = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe{}", b"9" * 5000]),
)


def odd_json(text: str, change: tuple) -> bytes:
    """A JSON object with some of it replaced, (path of keys, value), what was below as well; or
    other bytes."""
    kind, what = change
    if kind == "bytes":
        return what
    data = json.loads(text)
    for names, value in what:
        place = data
        for name in names[:-1]:
            place = place.get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if value is ...:
            place.pop(names[-1], None)
        else:
            place[names[-1]] = value
    return json.dumps(data).encode()


def json_changes(paths: list[tuple[str, ...]]):
    one = st.tuples(st.sampled_from(paths), values | st.just(...))
    return st.tuples(st.just("keys"), st.lists(one, min_size=1, max_size=2)) | st.tuples(
        st.just("bytes"), junk
    )


# What to do to a safetensors file.
def odd_tensors(path: Path, change: tuple) -> None:
    kind, where, what = change
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: int(where * len(data))])
    elif kind == "byte":
        at = int(where * min(len(data), 900))
        path.write_bytes(data[:at] + bytes([what]) + data[at + 1 :])
    else:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        name = sorted(tensors)[int(where * len(tensors)) % len(tensors)]
        t = tensors[name]
        if kind == "value" and t.numel():
            value = (
                float(what)
                if t.is_floating_point()
                else int(max(min(what, 2**31 - 1), -(2**31)))
                if what == what
                else 0
            )
            t.view(-1)[int(where * t.numel()) % t.numel()] = value
        elif kind == "shape":
            tensors[name] = t[:-1] if what else t.unsqueeze(0)
        elif kind == "kind":
            tensors[name] = t.to(torch.int64 if what else torch.float64)
        elif kind == "name":
            tensors[f"{name}x"] = tensors.pop(name)
        else:
            metadata = {"scan": what} if isinstance(what, str) else None
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


share = st.floats(0, 1, exclude_max=True)
numbers_in_files = st.sampled_from(
    [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e30, 96.0, 2.0**31]
)
tensor_changes = st.one_of(
    st.tuples(st.just("cut"), share, st.none()),
    st.tuples(st.just("byte"), share, st.integers(0, 255)),
    st.tuples(st.just("value"), share, numbers_in_files),
    st.tuples(st.sampled_from(["shape", "kind", "name"]), share, st.booleans()),
    st.tuples(
        st.just("metadata"),
        share,
        st.none() | st.sampled_from(["", "{}", "[]", "{", '{"share": "a"}']),
    ),
)

texts = st.text(max_size=12) | st.sampled_from(["w5 w6 w7", "", "w3 " * 400, "\ud800", "\x00"])
ids = st.lists(st.integers(0, 95) | st.sampled_from([-1, 96, 2**31, 10**30, 1.5, True]), max_size=5)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": values}),
    max_size=2,
)
good_rows = st.sampled_from(
    [
        {"text": "w5 w6 w7"},
        {"prompt": "w5", "completion": "w6"},
        {"input_ids": [3, 4], "labels": [3, 4]},
    ]
)
odd_rows = st.one_of(
    st.fixed_dictionaries({"text": texts | values}),
    st.fixed_dictionaries({"prompt": texts, "completion": texts | values}),
    st.fixed_dictionaries({"messages": messages}),
    ids.map(lambda x: {"input_ids": x, "labels": x}),
    st.fixed_dictionaries({"input_ids": ids, "labels": ids}),
    values,
)
lines = (good_rows | odd_rows).map(lambda row: json.dumps(row).encode()) | junk
files_of_rows = st.lists(
    good_rows.map(lambda row: json.dumps(row).encode()) | lines, max_size=5
).map(b"\n".join)


def test_rows(good):
    def check(example):
        name, data = example
        with TemporaryDirectory() as folder:
            rows, output = Path(folder, "rows.jsonl"), Path(folder, "out")
            rows.write_bytes(data)
            done = command(name, "--model", good / "model", "--data", rows, "--output", output)
            held(done, output, (CONFIG_NAME,))

    hostile(st.tuples(st.sampled_from(["train", "scan"]), files_of_rows), check)


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
        *(
            "0",
            "1",
            "-1",
            "2",
            "0.5",
            "1e-3",
            "inf",
            "nan",
            "-inf",
            "1e400",
            "1e30",
            "1e-320",
            "",
            " ",
            "x",
            "٣",
            "1_000",
        ),
        *(
            str(2**31),
            str(2**63 - 1),
            str(2**63),
            str(2**64),
            str(-(2**63) - 1),
            "0x10",
            "true",
            "None",
            "\udc80",
            "[/red]",
            "2G",
        ),
    ]
)
small_values = st.sampled_from(
    ["0", "1", "-1", "2", "0.5", "inf", "nan", "", "x", str(2**63), str(-(2**63) - 1)]
)
_TRAIN = (
    *(
        "objective",
        "min-p",
        "gravity",
        "power",
        "max-length",
        "per-device-train-batch-size",
        "batch-tokens",
        "learning-rate",
    ),
    *(
        "lr-scheduler-type",
        "warmup-ratio",
        "max-rank",
        "trivial-prob",
        "easy-fraction",
        "eval-fraction",
        "eval-steps",
    ),
    *(
        "early-stopping-patience",
        "save-total-limit",
        "max-memory",
        "report-to",
        "seed",
        "sweep",
        *_LONG,
    ),
)
_SCAN = (
    *(
        "max-length",
        "batch-tokens",
        "rows-per-shard",
        "max-bytes",
        "max-rank",
        "trivial-prob",
        "easy-fraction",
        "seed",
    ),
    *("split", "data"),
)
_OTHERS = {
    "calibrate": ("alpha", "min-p"),
    "report": ("min-p", "model"),
    "generate": ("min-p", "seed", "max-new-tokens", "prompt"),
}

_OPTIONS = {
    **{
        "scan": _SCAN,
        "train": _TRAIN,
        "scanned": _TRAIN,
        "calibrate": ("alpha", "min-p"),
        "report": ("min-p", "model"),
    },
    "generate": ("min-p", "seed", "max-new-tokens", "prompt"),
}


def options_of(names: tuple[str, ...]):
    def value(name: str):
        if name == "sweep":
            axis = st.tuples(
                st.sampled_from(["gravity", "min_p", "seed", "power", ""]),
                st.lists(option_values, max_size=2),
            )
            return st.lists(axis.map(lambda e: f"{e[0]}={','.join(e[1])}"), max_size=2).map(
                " ".join
            )
        if name in ("objective", "lr-scheduler-type"):
            return option_values | st.sampled_from(
                ["autodeco_joint", "autodeco_temperature", "constant"]
            )
        return small_values if name in _LONG else option_values

    one = st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), value(name)))
    return st.lists(one, min_size=1, max_size=4, unique_by=lambda pair: pair[0])


def arguments_of(name: str, good: Path, head: Path, output: Path) -> list:
    """Of a command that would be served; "scanned" trains from a scan."""
    given = {
        "scan": [
            "scan",
            "--model",
            good / "model",
            "--data",
            good / "rows.jsonl",
            "--output",
            output,
        ],
        "train": [
            "train",
            "--model",
            good / "model",
            "--data",
            good / "rows.jsonl",
            "--output",
            output,
        ],
        "scanned": ["train", "--scan", good / "scan", "--output", output],
        "calibrate": ["calibrate", "--head", head, "--scan", good / "scan", "--alpha", "0.4"],
        "report": ["report", "--head", head, "--scan", good / "scan", "--output", output],
        "generate": [
            "generate",
            "--model",
            good / "model",
            "--head",
            head,
            "--prompt",
            "w5",
            "--max-new-tokens",
            "2",
        ],
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
            only_served = (
                () if "sweep" in dict(options) else (CONFIG_NAME,)
            )  # a sweep keeps the heads of points before
            held(
                done,
                head if name == "calibrate" else output,
                () if name == "calibrate" else only_served,
            )
            if done.returncode:
                assert (head / CONFIG_NAME).read_bytes() == before

    some = st.sampled_from(sorted(_OPTIONS))
    hostile(some.flatmap(lambda name: st.tuples(st.just(name), options_of(_OPTIONS[name]))), check)


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
    special = [
        "",
        "~",
        "2024-01-01",
        "[1]",
        "{a: 1}",
        "!!bool b",
        "&a [*a]",
        "yes",
        "'1e-3'",
        "1:30",
    ]
    written = option_values | st.sampled_from(special)
    keys = st.sampled_from([*names, "2", "", "[a]", "? b"])
    entry = st.tuples(keys, written).map(lambda e: f"{e[0]}: {e[1]}")
    text = st.lists(entry, max_size=4).map(lambda x: "\n".join(x).encode("utf-8", "surrogatepass"))
    hostile(text | junk, check)


HEAD_PATHS = [
    ("hidden_size",),
    ("intermediate_size",),
    ("max_temperature",),
    ("offset",),
    ("min_p",),
    ("more",),
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
    *[
        (name,)
        for name in (
            "format",
            "settings",
            "revision",
            "hidden_size",
            "lm_head",
            "tokenizer",
            "data",
        )
    ],
    *[(name,) for name in ("share", "shards", "kept", "counts")],
    *[("settings", name) for name in ("model", "all_tokens", "seed", "max_rank")],
    *[("counts", name) for name in ("rows", "seen", "trivial")],
]


def test_scans(good):
    def check(example):
        name, manifest, tensors = example
        with TemporaryDirectory() as folder:
            copy = Path(folder)
            for part in ("head", "scan"):
                shutil.copytree(good / part, copy / part)
            for part in ("model", "rows.jsonl"):
                (copy / part).symlink_to(good / part)
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
