"""Heads between AutoDeco checkpoints and this library's folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.autodeco import convert
from tests.autodeco_checkpoints import HIDDEN, flat_config, head_tensors, heads_only
from tests.checkpoint_folders import contents, plain_base, same_tensors
from tests.commands import assert_refuses, command


def test_new_heads_start_as_training_starts(tmp_path):
    base = plain_base(tmp_path / "base")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert.construct(str(base), tmp_path / name, seed=seed)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config == flat_config(base)
    tensors = load_file(tmp_path / "a/model.safetensors")
    expected = {name: (t.dtype, t.shape) for name, t in head_tensors().items()}
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == expected
    assert not tensors["temp_head.mlp.2.weight"].any()  # T is 1 everywhere
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert not same_tensors(tensors, load_file(tmp_path / "c/model.safetensors"))
    modes = {path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert modes == {(base / "config.json").stat().st_mode}


def saved_heads(folder: Path) -> tuple[Path, Path]:
    """Folders of a temperature head and, within, a top-p head."""
    temperature, top_p = TemperatureHead(32), TopPHead(32, use_enhanced_features=False)
    torch.nn.init.normal_(temperature.mlp[2].weight)
    temperature.save_pretrained(folder)
    top_p.save_pretrained(folder / "top_p_head")
    return folder, folder / "top_p_head"


def test_heads_of_ours_go_in_and_come_out(tmp_path):
    base = plain_base(tmp_path / "base")
    head, top_p = saved_heads(tmp_path / "head")
    convert.construct(str(base), tmp_path / "heads", head=str(head), top_p_head=str(top_p))
    config = json.loads((tmp_path / "heads/config.json").read_text())
    assert config == flat_config(base, enhanced=False)
    convert.split(str(tmp_path / "heads"), tmp_path / "parts")
    assert contents(tmp_path / "parts/head") == contents(head)
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    convert.split(str(tmp_path / "full"), tmp_path / "more", parts=["head"])
    assert contents(tmp_path / "more") == contents(tmp_path / "parts")


@pytest.mark.parametrize("which", ["head", "top_p_head"])
def test_one_head_of_ours_is_the_one_that_is_used(tmp_path, which):
    base = plain_base(tmp_path / "base")
    given = dict(zip(("head", "top_p_head"), saved_heads(tmp_path / "head")))[which]
    convert.construct(str(base), tmp_path / "heads", **{which: str(given)})
    config = json.loads((tmp_path / "heads/config.json").read_text())
    used = config["enable_temperature_head"], config["enable_top_p_head"]
    assert used == (which == "head", which == "top_p_head")
    prefix = {"head": "temp_head.", "top_p_head": "top_p_head."}[which]
    assert all(n.startswith(prefix) for n in load_file(tmp_path / "heads/model.safetensors"))
    convert.split(str(tmp_path / "heads"), tmp_path / "parts")
    folder = tmp_path / "parts/head" / ("" if which == "head" else "top_p_head")
    files = {"autodeco_config.json", "head.safetensors"}
    assert {path.name for path in (tmp_path / "parts").rglob("*") if path.is_file()} == files
    cls = TemperatureHead if which == "head" else TopPHead
    expected = cls.from_pretrained(given).state_dict()
    assert same_tensors(cls.from_pretrained(folder).state_dict(), expected)


def test_heads_in_bf16_come_out_in_fp32(tmp_path):
    base = plain_base(tmp_path / "base")
    tensors = {name: t.bfloat16() for name, t in head_tensors().items()}
    heads_only(tmp_path / "heads", base, heads=tensors)
    convert.split(str(tmp_path / "heads"), tmp_path / "parts")
    head = TemperatureHead.from_pretrained(tmp_path / "parts/head")
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, tensors[f"temp_head.{name}"].float())


def test_a_head_that_was_made_for_a_cut_warns(tmp_path):
    base = plain_base(tmp_path / "base")
    TemperatureHead(32, min_p=0.05).save_pretrained(tmp_path / "head")
    options = ("--base", base, "--output", tmp_path / "heads", "--head", tmp_path / "head")
    done = command("construct", *options)
    assert (done.returncode, done.stdout) == (0, f"written: {tmp_path / 'heads'}\n")
    assert done.stderr.startswith("warning: AutoDeco checkpoints know no Min-P: give min_p=0.05,")
    assert len(done.stderr.splitlines()) == 1


def offset_head() -> TemperatureHead:
    head = TemperatureHead(HIDDEN)
    head.offset = -0.25
    return head


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (lambda: TemperatureHead(8), "has width 8, the base 32"),
        (lambda: TemperatureHead(HIDDEN, 64), "intermediate_size must be 256"),
        (lambda: TemperatureHead(HIDDEN, max_temperature=1.5), "max_temperature must be 2"),
        (offset_head, "offset (of calibration) must be 0, all that AutoDeco checkpoints can"),
        (lambda: TopPHead(8), "has width 8, the base 32"),
        (lambda: TopPHead(HIDDEN, intermediate_size=64), "intermediate_size must be 256"),
    ],
)
def test_heads_that_the_format_cannot_express(tmp_path, head, words):
    made = head()
    made.save_pretrained(tmp_path / "own")
    option = "--head" if isinstance(made, TemperatureHead) else "--top-p-head"
    given = ("--base", plain_base(tmp_path / "base"), option, tmp_path / "own")
    done = command("construct", *given, "--output", tmp_path / "x")
    assert_refuses(done, f"{option[2:].replace('-', '_')} '{tmp_path / 'own'}'", words)
    assert not (tmp_path / "x").exists()
