"""AutoDeco checkpoints made, merged and split: what is written, and what it costs."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.autodeco import convert
from tests.autodeco_checkpoints import (
    base_folder,
    base_tensors,
    every_family,
    flat_config,
    head_tensors,
    heads_only,
    merged,
)
from tests.commands import ROOT, command

INDEX = "model.safetensors.index.json"
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
TEXTS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"é": 1}',
    "merges.txt": "#version: 0.2\n",
    "generation_config.json": '{"eos_token_id": 3}\n',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "free",
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_texts(folder: Path, texts: dict[str, str] = TEXTS) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, dtypes and shapes too."""
    described = [{name: (t.dtype, t.shape) for name, t in each.items()} for each in (a, b)]
    bits = [{name: t.reshape(-1).view(torch.uint8) for name, t in each.items()} for each in (a, b)]
    return described[0] == described[1] and all(bits[0][n].equal(bits[1][n]) for n in a)


def plain_base(folder: Path, config: dict = CONFIG) -> Path:
    """A folder with a model's configuration and one small tensor in one file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors", {"format": "pt"})
    return folder


@every_family
@pytest.mark.parametrize("sharded", [False, True])
def test_splitting_what_was_merged_gives_it_back(family, sharded, tmp_path):
    base = base_folder(tmp_path / "base", family, sharded=sharded, dtype=torch.bfloat16)
    write_texts(base)
    convert.construct(str(base), tmp_path / "heads")
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    convert.split(str(tmp_path / "full"), tmp_path / "parts")
    assert contents(tmp_path / "parts/base") == contents(base)
    assert contents(tmp_path / "parts/autodeco") == contents(tmp_path / "heads")

    full, heads = base_tensors(tmp_path / "full"), base_tensors(tmp_path / "heads")
    plain = base_tensors(base)
    assert same_tensors(full, {f"llm.{name}": t for name, t in plain.items()} | heads)
    index = json.loads((tmp_path / "full" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in full.values())
    if sharded:
        before = json.loads((base / INDEX).read_text())["metadata"]["total_parameters"]
        more = sum(t.numel() for t in heads.values())
        assert index["metadata"]["total_parameters"] == before + more
    else:
        assert "total_parameters" not in index["metadata"]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "full" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 -- not a dict
    assert set(index["weight_map"]) == set(full)
    assert {file for name, file in index["weight_map"].items() if name in heads} == {
        f"model-{len(set(index['weight_map'].values())):05d}-of-"
        f"{len(set(index['weight_map'].values())):05d}.safetensors"
    }


@every_family
@pytest.mark.parametrize("sharded", [False, True])
def test_released_checkpoints_are_split(family, sharded, tmp_path):
    """Heads among the base's tensors, no metadata, none of what `merge` keeps for `split`."""
    base = base_folder(tmp_path / "base", family, sharded=sharded)
    merged(tmp_path / "full", base, sharded=sharded)
    convert.split(str(tmp_path / "full"), tmp_path / "parts")
    assert same_tensors(base_tensors(tmp_path / "parts/base"), base_tensors(base))
    config = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "parts/base/config.json").read_text()) == config
    assert same_tensors(load_file(tmp_path / "parts/autodeco/model.safetensors"), head_tensors())
    assert json.loads((tmp_path / "parts/autodeco/config.json").read_text()) == flat_config(base)
    if sharded:
        index = json.loads((tmp_path / "parts/base" / INDEX).read_text())
        before = json.loads((base / INDEX).read_text())
        assert set(index["weight_map"]) == set(before["weight_map"])
        assert index["metadata"]["total_size"] == before["metadata"]["total_size"]
        in_file = sum(t.numel() for t in base_tensors(base).values())
        assert index["metadata"]["total_parameters"] == in_file
    else:
        assert not (tmp_path / "parts/base" / INDEX).exists()


def test_a_base_that_was_split_off_loads(tmp_path):
    from autodeco_fast.training.base_model import load_causal_lm

    base = base_folder(tmp_path / "base", "qwen3", sharded=True)
    merged(tmp_path / "full", base, sharded=True)
    convert.split(str(tmp_path / "full"), tmp_path / "parts", parts=["base"])
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["base"]
    ids = torch.arange(5)[None]
    before, after = (
        load_causal_lm(str(each))(ids).logits for each in (base, tmp_path / "parts/base")
    )
    assert torch.equal(before, after)


_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
_NAMES = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "é.safetensors"]
_TENSORS = st.lists(
    st.tuples(
        st.sampled_from(_DTYPES),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from(_NAMES),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    min_size=1,
    max_size=9,
)
_METADATA = st.none() | st.dictionaries(
    st.text('aé"\\\n', max_size=3), st.text(max_size=3), max_size=2
)
_TOTALS = st.sampled_from([None, {}, {"total_size": 1}, {"total_parameters": 7, "more": [1]}])


@settings(max_examples=40)
@given(_TENSORS, _METADATA, _TOTALS, st.booleans())
def test_any_files_come_back_as_they_were(tensors, metadata, totals, one_file):
    with TemporaryDirectory() as folder:
        base, heads = Path(folder, "base"), Path(folder, "heads")
        base.mkdir()
        (base / "config.json").write_text(json.dumps(CONFIG))
        files: dict[str, dict] = {}
        for i, (dtype, shape, file, name) in enumerate(tensors):
            value = torch.randint(0, 2, shape).to(dtype)
            files.setdefault("model.safetensors" if one_file else file, {})[f"{name}.{i}"] = value
        for file, each in files.items():
            save_file(each, base / file, metadata)
        if not one_file:
            weight_map = {name: file for file, each in files.items() for name in each}
            index = {"weight_map": weight_map} | ({} if totals is None else {"metadata": totals})
            (base / INDEX).write_text(json.dumps(index))
        heads_only(heads, base)
        convert.merge(str(base), str(heads), Path(folder, "full"))
        convert.split(str(Path(folder, "full")), Path(folder, "parts"))
        assert contents(Path(folder, "parts/base")) == contents(base)
        assert contents(Path(folder, "parts/autodeco")) == contents(heads)
        index = json.loads(Path(folder, "full", INDEX).read_text())
        size = sum(t.nbytes for t in base_tensors(Path(folder, "full")).values())
        assert index["metadata"]["total_size"] == size


def test_files_of_other_writers_keep_their_tensors(tmp_path):
    """Headers with spaces, in another order than the data, and not padded."""
    base = plain_base(tmp_path / "base")
    data = bytes(range(12))
    header = {
        "b": {"data_offsets": [8, 12], "shape": [4], "dtype": "U8"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    }
    text = json.dumps(header, indent=3).encode()
    file = len(text).to_bytes(8, "little") + text + data
    (base / "model.safetensors").write_bytes(file)
    heads_only(tmp_path / "heads", base)
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    convert.split(str(tmp_path / "full"), tmp_path / "parts")
    again = load_file(tmp_path / "parts/base/model.safetensors")
    assert same_tensors(again, load_file(base / "model.safetensors"))
    assert bytes(again["b"].tolist()) == data[8:]


def test_a_configuration_that_forgot_its_base_learns_it_when_merged(tmp_path):
    """The released code writes "autodeco" there when it saves a configuration that it has read."""
    base = plain_base(tmp_path / "base")
    config = flat_config(base, base_model_type="autodeco")
    heads_only(tmp_path / "heads", base, config=config)
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    kept = json.loads((tmp_path / "full/config.json").read_text())
    assert kept == {**config, "base_model_type": "llama"}


def test_what_is_carried(tmp_path):
    base = plain_base(tmp_path / "base")
    write_texts(base)
    others = ["README.md", "modeling_x.py", "pytorch_model.bin", "training_args.bin", "vocab.pt"]
    write_texts(base, dict.fromkeys([*others, ".env", "tokenizer.model.pkl"], "x"))
    convert.construct(str(base), tmp_path / "heads")
    written = {"config.json", "model.safetensors"}
    assert set(contents(tmp_path / "heads")) == {*TEXTS, *written}
    for name, text in TEXTS.items():
        assert (tmp_path / "heads" / name).read_text() == text


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


def test_the_commands(tmp_path):
    base, heads, full = plain_base(tmp_path / "base"), tmp_path / "heads", tmp_path / "full"
    for arguments in (
        ("construct", "--base", base, "--output", heads, "--seed", 3),
        ("merge", "--base", base, "--heads", heads, "--output", full),
        ("split", "--checkpoint", full, "--output", tmp_path / "all"),
        ("split", "--checkpoint", full, "--output", tmp_path / "two")
        + ("--part", "head", "--part", "autodeco"),
    ):
        done = command(*arguments)
        output = arguments[arguments.index("--output") + 1]
        assert (done.returncode, done.stdout) == (0, f"written: {output}\n")
        assert done.stderr == ""
    assert contents(tmp_path / "all/base") == contents(base)
    assert contents(tmp_path / "all/autodeco") == contents(heads)
    two = contents(tmp_path / "all")
    two = {name: data for name, data in two.items() if not name.startswith("base/")}
    assert contents(tmp_path / "two") == two


def on_the_hub(monkeypatch, cache: Path, repos: dict[str, Path]) -> list[list[str]]:
    """Folders that a hub would have, fetched as huggingface_hub lays them out: links into blobs.

    Returns:
        what is asked for, a list of patterns every time.
    """
    import fnmatch

    import huggingface_hub

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        repo = cache / f"models--{name.replace('/', '--')}"
        snapshot, blobs = repo / "snapshots/abc", repo / "blobs"
        snapshot.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        for path in repos[name].iterdir():
            wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not (snapshot / path.name).exists():
                blob = blobs / f"{path.name}-blob"
                blob.write_bytes(path.read_bytes())
                (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_base_on_the_hub(monkeypatch, tmp_path):
    base = base_folder(tmp_path / "base", "llama", sharded=True)
    write_texts(base, {"tokenizer.json": "{}", "README.md": "x", "consolidated.safetensors": "x"})
    asked = on_the_hub(monkeypatch, tmp_path / "hub", {"some/model": base})
    convert.construct("some/model", tmp_path / "heads")
    snapshot = tmp_path / "hub/models--some--model/snapshots/abc"
    assert {path.name for path in snapshot.iterdir()} == {
        *("config.json", INDEX, "tokenizer.json", "generation_config.json")
    }  # no weights
    config = json.loads((tmp_path / "heads/config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    asked.clear()
    convert.merge("some/model", str(tmp_path / "heads"), tmp_path / "full")
    assert not any("*.safetensors" in patterns for patterns in asked)
    assert not (snapshot / "consolidated.safetensors").exists()
    convert.split(str(tmp_path / "full"), tmp_path / "parts")
    expected = contents(base)
    del expected["README.md"], expected["consolidated.safetensors"]
    assert contents(tmp_path / "parts/base") == expected


def large_base(folder: Path, size: int) -> Path:
    """A base of one tensor of zeros that takes no room on the disk."""
    plain_base(folder)
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    return folder


def peak(call) -> int:
    """Bytes by which memory grows at most while a function runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is taken now

    def highest() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])

    before = highest()
    call()
    return highest() - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_does_not_hold_a_file(tmp_path):
    size = 64 << 20
    base = large_base(tmp_path / "base", size)
    heads_only(tmp_path / "heads", base)
    full, parts = tmp_path / "full", tmp_path / "parts"
    merging = peak(lambda: convert.merge(str(base), str(tmp_path / "heads"), full))
    splitting = peak(lambda: convert.split(str(full), parts))
    loading = peak(lambda: (parts / "base/model.safetensors").read_bytes())  # the control
    assert merging < size / 4
    assert splitting < size / 4
    assert loading > size * 0.9
    assert (parts / "base/model.safetensors").stat().st_size >= size


def test_an_interruption_leaves_nothing(tmp_path):
    base = large_base(tmp_path / "base", 20 << 20)
    heads_only(tmp_path / "heads", base)
    before = contents(tmp_path)
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full", progress=interrupt)
    assert len(seen) > 1
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "heads"}


def test_a_run_that_is_killed_leaves_no_folder_and_may_be_repeated(tmp_path):
    base = large_base(tmp_path / "base", 20 << 20)
    heads_only(tmp_path / "heads", base)
    code = f"""
import os, signal
from pathlib import Path
from autodeco_fast.autodeco.convert import merge
def kill(done, total):
    if 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)
merge({str(base)!r}, {str(tmp_path / "heads")!r}, Path({str(tmp_path / "full")!r}), progress=kill)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"base", "heads", ".full.draft"}
    assert any((tmp_path / ".full.draft").glob("*.safetensors"))
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "heads", "full"}
    convert.split(str(tmp_path / "full"), tmp_path / "parts")
    assert contents(tmp_path / "parts/base") == contents(base)
