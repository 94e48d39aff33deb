"""AutoDeco checkpoints that are broken, hostile or of another model: one line, nothing is left."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autodeco_fast import TemperatureHead
from autodeco_fast.autodeco import convert
from tests.autodeco_checkpoints import HIDDEN, base_folder, heads_only
from tests.commands import assert_refuses, command, listing
from tests.hostile import search
from tests.hostile_files import json_changes, odd_json, odd_tensors, tensor_changes

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders of a base in several files, heads for it, and both merged: nothing is wrong."""
    folder = tmp_path_factory.mktemp("made")
    base_folder(folder / "base", "llama", sharded=True)
    (folder / "base/tokenizer.json").write_text("{}")
    heads_only(folder / "heads", folder / "base")
    convert.merge(str(folder / "base"), str(folder / "heads"), folder / "full")
    return folder


@pytest.fixture
def good(made, tmp_path) -> Path:
    """A copy of them, to break."""
    return shutil.copytree(made, tmp_path / "good")


def call(name: str, folder: Path, output: Path):
    """A command that would be served."""
    base, heads = ("--base", folder / "base"), ("--heads", folder / "heads")
    given = {
        "construct": base,
        "merge": (*base, *heads),
        "split": ("--checkpoint", folder / "full"),
        "split heads": ("--checkpoint", folder / "heads"),
    }
    return command(name.split()[0], *given[name], "--output", output)


def refused(name: str, folder: Path, *words: str) -> None:
    """One line, and the folders are what they were."""
    before = listing(folder)
    assert_refuses(call(name, folder, folder / "new/out"), *words)
    assert listing(folder) == before
    assert not (folder / "new").exists()


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(("name", "where"), [("merge", "base"), ("split", "full")])
def test_files_that_are_not_whole(good, name, where):
    shard = first_shard(good / where)
    cut(shard)
    refused(name, good, f"{shard} is not a safetensors file")
    shard.write_bytes(b"")
    refused(name, good, f"{shard} is not a safetensors file")
    shard.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    refused(name, good, f"{shard} is not a safetensors file")
    shard.unlink()
    refused(name, good, f"has no file {shard.name}")


def test_heads_that_are_not_whole(good):
    cut(good / "heads" / WEIGHTS)
    for name in ("merge", "split heads"):
        refused(name, good, f"{good / 'heads' / WEIGHTS} is not a safetensors file")


@pytest.mark.parametrize(("name", "where"), [("merge", "base"), ("split", "full")])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].update(a="model-9.safetensors"), "has no file model-9"),
        (lambda index: index["weight_map"].update(a="../x.safetensors"), "../x.safetensors"),
        (lambda index: index["weight_map"].update(a="/etc/x.safetensors"), "/etc/x.safetensors"),
        (lambda index: index["weight_map"].update(a="x/y.safetensors"), "x/y.safetensors"),
        (lambda index: index["weight_map"].update(a="..\\x.safetensors"), "x.safetensors"),
        (lambda index: index["weight_map"].update(a="pytorch_model.bin"), "pytorch_model.bin"),
        (lambda index: index["weight_map"].update(a=3), "a file must be"),
        (lambda index: index["weight_map"].popitem(), "does not know"),
        (lambda index: index["weight_map"].clear(), "must hold a weight_map"),
        (lambda index: index.clear(), "must hold a weight_map"),
    ],
)
def test_indices_that_say_something_else(good, name, where, change, words):
    change_json(good / where / INDEX, change)
    refused(name, good, f"{INDEX}" if "no file" not in words else "", words)


def test_an_index_with_a_tensor_that_is_not_there(good):
    def change(index):
        index["weight_map"]["model.more.weight"] = first_shard(good / "base").name

    change_json(good / "base" / INDEX, change)
    refused("merge", good, f"'model.more.weight' is not in {first_shard(good / 'base').name}")


def test_an_index_that_is_no_json(good):
    (good / "base" / INDEX).write_text("[" * 100_000)
    refused("merge", good, f"{good / 'base' / INDEX}: not JSON")
    (good / "base" / INDEX).write_text("[]")
    refused("merge", good, f"{good / 'base' / INDEX} must hold a JSON object, got list")


def test_a_file_wins_over_an_index_of_others_as_in_transformers(good, tmp_path):
    save_file({"one": torch.ones(3)}, good / "base" / WEIGHTS)
    assert call("merge", good, tmp_path / "out").returncode == 0
    heads = load_file(good / "heads" / WEIGHTS)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == {"llm.one", *heads}


def test_pickle_is_not_read(good):
    for path in (good / "base").glob("model*"):
        path.unlink()
    (good / "base/pytorch_model.bin").write_bytes(b"x")
    refused("merge", good, f"has neither {WEIGHTS} nor {INDEX}; other formats, pickle above all")


@pytest.mark.parametrize("where", ["heads", "full"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("temp_head.mlp.2.bias"), "has no tensor 'temp_head.mlp.2.bias'"),
        (lambda t: t.pop("top_p_head.mlp.0.weight"), "has no tensor 'top_p_head.mlp.0.weight'"),
        (
            lambda t: t.update({"temp_head.mlp.4.weight": torch.ones(2)}),
            "tensor 'temp_head.mlp.4.weight' is none of the heads'",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(2)}), "'model.norm.weight' is none"),
        (
            lambda t: t.update({"temp_head.mlp.0.weight": torch.ones(256, 8)}),
            "'temp_head.mlp.0.weight' must be (256, 32), got (256, 8)",
        ),
        (
            lambda t: t.update({"temp_head.mlp.0.bias": torch.ones(256, dtype=torch.int32)}),
            "dtype of 'temp_head.mlp.0.bias'",
        ),
        (
            lambda t: t["top_p_head.mlp.2.bias"].fill_(float("nan")),
            "must be finite, top_p_head.mlp.2.bias holds NaN",
        ),
    ],
)
def test_heads_that_do_not_fit(good, where, change, words):
    path = good / "heads" / WEIGHTS if where == "heads" else max((good / "full").glob("model-*-*"))
    change_tensors(path, change)
    if where == "full":  # the index knows of it
        change_json(
            good / "full" / INDEX,
            lambda index: index.update(
                weight_map={n: f for n, f in index["weight_map"].items() if f != path.name}
                | dict.fromkeys(load_file(path), path.name)
            ),
        )
    refused("merge" if where == "heads" else "split", good, str(good / where), words)


def test_a_checkpoint_without_heads(good):
    change_tensors(good / "heads" / WEIGHTS, dict.clear)
    refused("merge", good, "has no tensor 'temp_head.mlp.0.weight'")
    off = {"enable_temperature_head": False, "enable_top_p_head": False}
    change_json(good / "heads" / CONFIG, lambda config: config.update(off))
    refused("merge", good, f"'{good / 'heads'}' has no tensors of heads")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model_type": "qwen2"}, "is of type 'llama', the heads were made for 'qwen2'"),
        ({"hidden_size": 64}, "has hidden_size 32, the heads were made for 64"),
        ({"num_hidden_layers": 3}, "has num_hidden_layers 2, the heads were made for 3"),
        ({"vocab_size": 95}, "has vocab_size 96, the heads were made for 95"),
        ({"model_type": "llama"}, "model_type must be 'autodeco', got 'llama'"),
        ({"temperature_hidden_size": 8}, "'temp_head.mlp.0.weight' must be (256, 8)"),
        ({"use_enhanced_features": False}, "'top_p_head.mlp.0.weight' must be (256, 33)"),
        ({"base_model_name_or_path": "../../etc"}, "base_model_name_or_path must be"),
        ({"enable_top_p_head": "yes"}, "enable_top_p_head must be true or false, got 'yes'"),
    ],
)
def test_configurations_of_something_else(good, change, words):
    change_json(good / "heads" / CONFIG, lambda config: config.update(change))
    refused("merge", good, words)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("base_config.json", {"hidden_size": 64}, "has hidden_size 64, the heads were made for 32"),
        ("base_config.json", {"model_type": "autodeco"}, "is an AutoDeco checkpoint"),
        ("base_index.json", {"weight_map": {"a": "../x.safetensors"}}, "../x.safetensors"),
        ("base_index.json", {"weight_map": {"a": "x.safetensors"}}, "tensors differ in 'a'"),
    ],
)
def test_what_merge_kept_is_not_trusted(good, file, change, words):
    change_json(good / "full" / file, lambda value: value.update(change))
    refused("split", good, str(good / "full" / file), words)


def test_folders_in_each_others_places(good):
    full, heads, base = good / "full", good / "heads", good / "base"
    output = ("--output", good / "out")
    swapped = [
        (("merge", "--base", full, "--heads", heads), "is an AutoDeco checkpoint: split it first"),
        (("merge", "--base", base, "--heads", full), "holds a base model too: split it first"),
        (("merge", "--base", base, "--heads", base), "model_type must be 'autodeco', got 'llama'"),
        (("construct", "--base", heads), "the base model must be a plain one"),
        (("split", "--checkpoint", base), "model_type must be 'autodeco', got 'llama'"),
        (("split", "--checkpoint", heads, "--part", "base"), "part must be one of head, got base"),
        (("split", "--checkpoint", full, "--part", "x"), "one of base, autodeco, head, got x"),
        (("split", "--checkpoint", good / "no/where"), "checkpoint must be a folder or a hub id"),
        (("split", "--checkpoint", good), f"'{good}' has no file config.json"),
        (("merge", "--base", "no/model", "--heads", heads), "base must be a folder or a hub id"),
    ]
    for arguments, words in swapped:
        assert_refuses(command(*arguments, *output), words)
    TemperatureHead(HIDDEN).save_pretrained(good / "own")
    done = command("merge", "--base", base, "--heads", good / "own", *output)
    assert_refuses(done, "is a head folder: `construct` makes a checkpoint of it")
    assert not (good / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG, INDEX, "shard", "merges.txt"])
def test_links_that_leave_the_folder(good, name):
    secret = good / "secret"
    path = first_shard(good / "base") if name == "shard" else good / "base" / name
    if path.exists():
        path.rename(secret)
    else:
        secret.write_text("x")
    path.symlink_to(secret)
    refused("merge", good, f"{path} is a link that leaves its folder")
    if name == "tokenizer.json":
        refused("construct", good, f"{path} is a link that leaves its folder")
        path.unlink()
        path.symlink_to("gone")
        refused("merge", good, "has no file tokenizer.json")
        path.unlink()
        secret.rename(good / "base/real.json")
        path.symlink_to("real.json")
        assert call("merge", good, good / "fine").returncode == 0
        assert (good / "fine/tokenizer.json").read_text() == "{}"
        assert not (good / "fine/tokenizer.json").is_symlink()


@pytest.mark.parametrize("name", ["construct", "merge", "split", "split heads"])
def test_outputs_that_are_there(good, tmp_path, name):
    before = listing(good)
    for output in (good / "base", good / "base/config.json", good):
        assert_refuses(call(name, good, output), "output must name a new folder", "there already")
    assert_refuses(call(name, good, good / "base/config.json/x"), "cannot be written")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert_refuses(call(name, good, tmp_path / "link"), "output must name a new folder")
    (tmp_path / ".x.draft").symlink_to(good / "base")
    assert_refuses(call(name, good, tmp_path / "x"), ".x.draft is a link")
    assert listing(good) == before
    (tmp_path / "empty").mkdir()
    assert call(name, good, tmp_path / "empty").returncode == 0


def test_an_output_that_another_run_writes(good):
    from autodeco_fast.files import new_folder

    with new_folder(good / "out"):
        assert_refuses(call("merge", good, good / "out"), "is being written by another run")
    assert list((good / "out").iterdir()) == []


def test_an_output_that_was_made_meanwhile(good):
    def make(done: int, total: int) -> None:
        (good / "out").mkdir(exist_ok=True)
        (good / "out/precious").touch()

    with pytest.raises(ValueError, match="output must name a new folder"):
        convert.merge(str(good / "base"), str(good / "heads"), good / "out", progress=make)
    assert os.listdir(good / "out") == ["precious"]
    assert not (good / ".out.draft").exists()


def test_a_disk_without_room(good, monkeypatch):
    free = 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    refused("merge", good, "GB, the disk has 0.0001 GB")
    refused("split", good, "GB, the disk has 0.0001 GB")


def test_a_disk_that_fills_up(good, monkeypatch):
    from autodeco_fast.autodeco import tensor_files

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "_copy", full)
    refused("merge", good, "No space left on device")


def test_a_file_that_becomes_shorter_meanwhile(good):
    shards = sorted((good / "base").glob("model-*"))

    def shorten(done: int, total: int) -> None:
        shards[-1].write_bytes(b"")

    with pytest.raises(ValueError, match="became shorter while it was copied"):
        convert.merge(str(good / "base"), str(good / "heads"), good / "out", progress=shorten)
    assert not (good / "out").exists()


_CONFIG_PATHS = [
    (name,)
    for name in (
        *("model_type", "base_model_type", "base_model_name_or_path", "hidden_size", "vocab_size"),
        *("temperature_hidden_size", "use_enhanced_features", "enable_top_p_head", "auto_map"),
    )
]
_INDEX_PATHS = [
    *[("metadata",), ("weight_map",), ("metadata", "total_size"), ("metadata", "total_parameters")],
    *[("weight_map", f"{prefix}model.norm.weight") for prefix in ("", "llm.")],
    ("weight_map", "temp_head.mlp.0.bias"),
]
_FILES = {
    "merge": [("base", CONFIG), ("base", INDEX), ("heads", CONFIG)],
    "split": [("full", name) for name in (CONFIG, INDEX, "base_config.json", "base_index.json")],
    "split heads": [("heads", CONFIG)],
    "construct": [("base", CONFIG)],
}


def test_anything_is_served_or_refused_in_one_line(made):
    def check(example):
        name, (where, file), change, tensors = example
        with TemporaryDirectory() as folder:
            copy = Path(folder, "copy")
            shutil.copytree(made, copy)
            path = copy / where / file
            path.write_bytes(odd_json(path.read_text(), change))
            if tensors is not None:
                odd_tensors(max((copy / where).glob("*.safetensors")), tensors)
            before = listing(copy)
            done = call(name, copy, Path(folder, "out"))
            assert done.returncode in (0, 2), done
            lines = done.stderr.splitlines()
            complaints = [line for line in lines if line.startswith("error: ")]
            assert len(complaints) == (done.returncode == 2), done.stderr
            assert len(lines) == len(complaints) or "warning: " in done.stderr
            assert Path(folder, "out").exists() == (done.returncode == 0)
            assert set(os.listdir(folder)) <= {"copy", "out"}
            assert listing(copy) == before

    changes = json_changes(_CONFIG_PATHS) | json_changes(_INDEX_PATHS) | st.just(("keys", []))
    names = st.sampled_from(sorted(_FILES)).flatmap(
        lambda name: st.tuples(st.just(name), st.sampled_from(_FILES[name]))
    )
    search(
        st.tuples(names, changes, st.none() | tensor_changes).map(
            lambda x: (*x[0], x[1], x[2]),
        ),
        check,
        examples=25,
        fuzzed=50,
    )
