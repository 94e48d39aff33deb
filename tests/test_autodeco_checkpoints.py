"""AutoDeco checkpoints made, merged and split: what is written, and what it costs."""

import json
import shutil
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM

from autodeco_fast import AutoDecoModelForCausalLM, TemperatureHead
from autodeco_fast.autodeco import convert
from autodeco_fast.cli import checkpoints
from autodeco_fast.training.base_model import load_causal_lm
from tests.autodeco_checkpoints import (
    base_folder,
    base_tensors,
    every_family,
    flat_config,
    head_tensors,
    heads_only,
    merged,
)
from tests.checkpoint_folders import (
    CONFIG,
    INDEX,
    TEXTS,
    contents,
    on_the_hub,
    plain_base,
    same_tensors,
    write_texts,
)
from tests.commands import command
from tests.forked import forked


@pytest.mark.parametrize("base_has_one", [True, False])
def test_heads_keep_their_generation_configuration(base_has_one, tmp_path):
    base = base_folder(tmp_path / "base", "llama")
    path = base / "generation_config.json"
    path.write_text('{"max_new_tokens": 7}')
    convert.construct(str(base), tmp_path / "heads")
    (tmp_path / "heads/generation_config.json").write_text('{"max_new_tokens": 3}')
    if not base_has_one:
        path.unlink()
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    full = AutoDecoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert full.generation_config.max_new_tokens == 3
    convert.split(str(tmp_path / "full"), tmp_path / "parts")
    assert contents(tmp_path / "parts/base") == contents(base)
    assert contents(tmp_path / "parts/autodeco") == contents(tmp_path / "heads")


def test_a_base_may_name_its_sizes_as_it_always_did(tmp_path):
    """BLOOM's width was `n_embed`; what the class has by default need not be said at all."""
    base = tmp_path / "base"
    sizes = {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["n_embed"] = config.pop("hidden_size")
    (base / "config.json").write_text(json.dumps(config))
    convert.construct(str(base), tmp_path / "heads")
    assert AutoDecoModelForCausalLM.from_pretrained(tmp_path / "heads").temp_head is not None
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    assert AutoDecoModelForCausalLM.from_pretrained(tmp_path / "full").temp_head is not None


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


@settings(max_examples=20)
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


def test_what_cannot_be_given_back_is_said(tmp_path):
    """Code of the base's own; its architectures, of a type that is not among the released ones."""
    config = {**CONFIG, "model_type": "mistral", "auto_map": {"AutoConfig": "c.C"}}
    base = plain_base(tmp_path / "base", config)
    heads_only(tmp_path / "heads", base)
    with pytest.warns(UserWarning, match="has code of its own, which is not copied"):
        convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    (tmp_path / "full/base_config.json").unlink()
    with pytest.warns(UserWarning, match="architectures are not known: add them to its config"):
        convert.split(str(tmp_path / "full"), tmp_path / "parts")
    again = json.loads((tmp_path / "parts/base/config.json").read_text())
    assert again == {**CONFIG, "model_type": "mistral"}


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


def test_large_ones_show_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_LARGE", 1000)
    base = plain_base(tmp_path / "base")
    heads_only(tmp_path / "heads", base)
    options = ("--base", base, "--heads", tmp_path / "heads", "--output", tmp_path / "full")
    done = command("merge", *options)
    assert (done.returncode, done.stdout) == (0, f"written: {tmp_path / 'full'}\n")
    total = sum(t.nbytes for t in base_tensors(tmp_path / "full").values())
    assert f"{total / 1000:.1f}/{total / 1000:.1f} kB" in done.stderr


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
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
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
    done = forked(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"base", "heads", ".full.draft"}
    assert any((tmp_path / ".full.draft").glob("*.safetensors"))
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "heads", "full"}
    convert.split(str(tmp_path / "full"), tmp_path / "parts")
    assert contents(tmp_path / "parts/base") == contents(base)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_model_class_reads_what_is_merged_and_writes_what_is_split(sharded, tmp_path):
    base = base_folder(tmp_path / "base", "qwen2", sharded=sharded)
    heads_only(tmp_path / "heads", base)
    convert.merge(str(base), str(tmp_path / "heads"), tmp_path / "full")
    shutil.move(base, tmp_path / "elsewhere")
    base = tmp_path / "elsewhere"
    model = AutoDecoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert same_tensors(dict(model.llm.state_dict()), dict(load_causal_lm(str(base)).state_dict()))
    model.save_pretrained(tmp_path / "saved", heads_only=False)
    convert.split(str(tmp_path / "saved"), tmp_path / "parts")
    assert same_tensors(base_tensors(tmp_path / "parts/base"), base_tensors(base))
    assert same_tensors(base_tensors(tmp_path / "parts/autodeco"), head_tensors())
    from_ours = TemperatureHead.from_pretrained(tmp_path / "parts/head").state_dict()
    assert same_tensors(dict(from_ours), dict(model.temp_head.state_dict()))
