"""Heads on disk: what is written, what is refused, and that refusing costs nothing."""

import errno
import json
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME


@pytest.fixture
def folder(tmp_path):
    TemperatureHead(8, 16, min_p=0.02).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def change(folder, **values) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_min_p_is_stored_and_may_be_missing(folder):
    assert TemperatureHead(8).min_p is None
    assert TemperatureHead.from_pretrained(folder).min_p == 0.02
    config = json.loads((folder / CONFIG_NAME).read_text())
    assert config.pop("min_p") == 0.02
    (folder / CONFIG_NAME).write_text(json.dumps(config))  # as heads were written before
    assert TemperatureHead.from_pretrained(folder).min_p is None


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("head_class", [TemperatureHead, TopPHead])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, value, head_class):
    head = head_class(8)
    head.save_pretrained(tmp_path / "good")
    before = (tmp_path / "good" / WEIGHTS_NAME).read_bytes()
    with torch.no_grad():
        head.mlp[0].weight[0, 0] = float(value)
    words = r"mlp\.0\.weight holds NaN or infinite values"
    for name in ("good", "new"):
        with pytest.raises(ValueError, match=f"must be finite, {words}"):
            head.save_pretrained(tmp_path / name)
    assert (tmp_path / "good" / WEIGHTS_NAME).read_bytes() == before
    assert not (tmp_path / "new").exists()
    save_file(head.state_dict(), tmp_path / "good" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=rf"head\.safetensors must be finite, {words}"):
        type(head).from_pretrained(tmp_path / "good")


def test_an_offset_that_is_not_finite_is_neither_written_nor_read(folder):
    head = TemperatureHead(8)
    head.offset = float("nan")
    with pytest.raises(ValueError, match="offset must be a finite number, got nan"):
        head.save_pretrained(folder)
    assert TemperatureHead.from_pretrained(folder).offset == 0.0
    change(folder, offset=float("nan"))
    with pytest.raises(ValueError, match="offset must be a finite number, got nan"):
        TemperatureHead.from_pretrained(folder)


ODD = {
    "hidden_size": ("8", 8.0, True, None, [8], 0, -1, 10**30),
    "intermediate_size": (1.5, {}, 0, 2**40),
    "max_temperature": ("2", 0, -1.0, float("inf"), float("nan"), 10**400, None, True),
    "offset": ("0", None, float("-inf"), [], 10**400),
    "min_p": (0, 1, 1.5, -0.1, "0.1", float("nan"), True, []),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ODD.items() for value in values]
)
def test_odd_configurations_are_refused_by_name(folder, name, value):
    change(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"^{name} must be ") as caught:
        TemperatureHead.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must hold a JSON object, got list"),
        ("3", "must hold a JSON object, got int"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON: RecursionError"),
        ("\udc80", "not JSON"),
        ("{}", "must have the keys"),
    ],
)
def test_configurations_that_are_no_objects_are_refused(folder, text, words):
    (folder / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=words):
        TemperatureHead.from_pretrained(folder)


def test_nothing_is_allocated_for_a_configuration_that_asks_for_more_than_the_file_has(folder):
    """30 GB are asked for, in a process that may take 2 GB more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    change(folder, hidden_size=30_000, intermediate_size=250_000)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9, hard))
    try:
        with pytest.raises(
            ValueError, match=r"head weights must be .*\(250000, 30000\).*, got .*\(16, 8\)"
        ):
            TemperatureHead.from_pretrained(folder)
        with pytest.raises(RuntimeError, match="allocate memory"):  # the control
            TemperatureHead(30_000, 250_000)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("cut", [0, 7, 60, -1])
def test_truncated_weights_are_refused(folder, cut):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        TemperatureHead.from_pretrained(folder)


def test_other_tensors_are_refused(folder):
    path = folder / WEIGHTS_NAME
    good = load_file(path)
    for tensors, words in (
        ({**good, "mlp.0.weight": torch.zeros(16, 9)}, "head weights must be"),
        ({**good, "more": torch.zeros(1)}, "head weights must be"),
        ({}, "head weights must be"),
        (
            {**good, "mlp.0.weight": torch.zeros(16, 8, dtype=torch.int8)},
            "must hold floating-point tensors, got F32, I8",
        ),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=words):
            TemperatureHead.from_pretrained(folder)


@pytest.mark.parametrize("step", range(5))
def test_an_overwritten_head_is_the_old_one_the_new_one_or_none(folder, monkeypatch, step):
    """On a disk that is full from one of its renames on, or a process killed there."""
    old, new = TemperatureHead(8, 16, min_p=0.02), TemperatureHead(8, 16, 1.0, offset=0.4)
    torch.nn.init.constant_(old.mlp[2].bias, 1.0)
    old.save_pretrained(folder)
    count, replace = iter(range(10)), os.replace

    def full(*paths):
        if next(count) >= step:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        if step < 4:
            with pytest.raises(OSError, match="No space left"):
                new.save_pretrained(folder)
        else:
            new.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} <= {CONFIG_NAME, WEIGHTS_NAME}
    if step in (2, 3):
        with pytest.raises(ValueError, match="has no autodeco_config"):
            TemperatureHead.from_pretrained(folder)
        return
    expected, got = new if step == 4 else old, TemperatureHead.from_pretrained(folder)
    assert repr(got) == repr(expected)
    assert got.mlp[2].bias == expected.mlp[2].bias


def test_files_have_the_permissions_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        TemperatureHead(8).save_pretrained(tmp_path / "head")
    finally:
        os.umask(before)
    for path in (tmp_path / "head").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_an_unknown_hub_id_is_one_line():
    with pytest.raises(
        ValueError, match="head must be a folder or a hub id like 'user/name', got 'nobody/nothing'"
    ) as caught:
        TemperatureHead.from_pretrained("nobody/nothing")
    assert "\n" not in str(caught.value)
