"""Checkpoints that are none, or of another base: refused in one line, before the base is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from autodeco_fast import AutoDecoConfig, AutoDecoModelForCausalLM
from autodeco_fast.autodeco import loading
from tests.autodeco_checkpoints import base_tensors, flat_config, head_tensors, heads_only, merged

load = AutoDecoModelForCausalLM.from_pretrained


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of a checkpoint to spoil."""

    def make(layout: str = "heads"):
        return shutil.copytree(checkpoint("llama", layout), tmp_path / layout)

    return make


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a base model was loaded")

    monkeypatch.setattr(loading.causal_lm, "load", load)


def edit(folder, file: str = "config.json", **changed) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def refused(match: str, folder, **options) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model_type": "llama"}, "model_type must be 'autodeco', got 'llama'"),
        ({"use_enhanced_features": "yes"}, "use_enhanced_features must be true or false"),
        ({"temperature_hidden_size": -1}, "temperature_hidden_size must be an integer"),
        ({"temperature_hidden_size": 64}, r"'temp_head\.mlp\.0\.weight' must be \(256, 64\)"),
        ({"use_enhanced_features": False}, r"top_p_head\.mlp\.0\.weight' must be \(256, 33\)"),
        ({"base_model_name_or_path": "../../other"}, r"without '\.\.', got '\.\./\.\./other'"),
        ({"base_model_name_or_path": None}, "names no base model: pass base_model="),
        ({"base_model_name_or_path": "gone/away"}, "'gone/away'.* cannot be loaded"),
        ({"base_model_type": "qwen2"}, "is of type 'llama', the heads were made for 'qwen2'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2, the heads were made for 3"),
        ({"enable_top_p_head": False, "enable_temperature_head": False}, "must be true, one of"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_configurations_that_do_not_fit(copied, changed, match):
    folder = copied()
    edit(folder, **changed)
    refused(match, folder)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_another_base_than_that_of_the_heads(checkpoint):
    folder = checkpoint("llama")
    refused(
        "is of type 'qwen3', the heads were made", folder, base_model=checkpoint("qwen3", "base")
    )
    refused("is an AutoDeco checkpoint: split it first", folder, base_model=folder)
    refused("cannot be loaded", folder, base_model=folder / "nothing")
    merged = checkpoint("llama", "merged")
    refused("base_model goes with heads alone", merged, base_model=checkpoint("llama", "base"))


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda t: without(t, "temp_head.mlp.2.bias"), r"no tensor 'temp_head\.mlp\.2\.bias'"),
        (lambda t: {**t, "other.weight": torch.ones(1)}, "'other.weight' is none of the heads'"),
        (lambda t: {**t, "temp_head.mlp.2.bias": torch.full((1,), torch.nan)}, "must be finite"),
        (lambda t: {**t, "temp_head.mlp.2.bias": torch.ones(1).int()}, "dtype of 'temp_head"),
        (lambda t: {"nothing": torch.ones(1)}, "has no tensor 'temp_head"),
    ],
)
@pytest.mark.usefixtures("nothing_is_loaded")
def test_tensors_that_do_not_fit(copied, spoil, match):
    folder = copied()
    save_file(spoil(head_tensors()), folder / "model.safetensors")
    refused(match, folder)


@pytest.mark.parametrize("layout", ["heads", "merged", "sharded"])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_files_that_are_broken_or_gone(copied, layout):
    folder = copied(layout)
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    refused("is not a safetensors file", folder)
    file.unlink()
    refused("has neither|has no file", folder)
    (folder / "config.json").write_text("{")
    refused("not JSON", folder)
    (folder / "config.json").unlink()
    refused("has no file config.json", folder)
    refused("must be a folder or a hub id", folder / "nowhere")


@pytest.mark.parametrize("path", ["../stolen.safetensors", "/etc/model.safetensors", "a/b"])
@pytest.mark.usefixtures("nothing_is_loaded")
def test_files_outside_the_folder(copied, path):
    folder = copied("sharded")
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())["weight_map"]
    edit(folder, index.name, weight_map={**found, "llm.lm_head.weight": path})
    refused("must be the name of a safetensors file beside it", folder)
    edit(folder, index.name, weight_map=found)
    shard = min(folder.glob("*.safetensors"))
    shard.rename(folder.parent / "stolen.safetensors")
    shard.symlink_to("../stolen.safetensors")
    refused("is a link that leaves its folder", folder)


def test_a_merged_checkpoint_without_all_of_its_base(checkpoint, tmp_path):
    base = checkpoint("qwen2", "base")
    tensors = {f"llm.{name}": tensor for name, tensor in base_tensors(base).items()}
    folder = merged(tmp_path / "a", base)
    rest = without(tensors, "llm.model.norm.weight")
    save_file({**rest, **head_tensors()}, folder / "model.safetensors")
    refused("lacks 1 of its weights: model.norm.weight", folder)
    more = {**tensors, "llm.model.extra": torch.ones(1), **head_tensors()}
    save_file(more, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors that Qwen2ForCausalLM does not use: .*extra"):
        load(folder)
    narrow = {**tensors, "llm.model.norm.weight": torch.ones(8), **head_tensors()}
    save_file(narrow, folder / "model.safetensors")
    refused("cannot be loaded", folder)


def test_what_cannot_be_passed(checkpoint):
    refused("subfolder cannot be used", checkpoint("llama"), subfolder="a")
    with pytest.raises(ValueError, match="base_model_type must be the base's model type"):
        AutoDecoConfig(
            **flat_config(checkpoint("llama", "base"), base_model_type=None)
        ).base_config()
    config = flat_config(checkpoint("llama", "base"), base_model_type="no_such_type")
    with pytest.raises(ValueError, match="one that transformers knows, got 'no_such_type'"):
        AutoDecoConfig(**config)


def test_the_auto_class_says_the_same(copied):
    folder = copied()
    save_file(without(head_tensors(), "top_p_head.mlp.0.bias"), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor 'top_p_head\.mlp\.0\.bias'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_path_outside_is_taken_where_the_user_gives_it(checkpoint, tmp_path, monkeypatch):
    config = flat_config(checkpoint("llama", "base"), base_model_name_or_path=None)
    folder = heads_only(tmp_path / "a" / "heads", checkpoint("llama", "base"), config=config)
    (tmp_path / "base").symlink_to(checkpoint("llama", "base"))
    monkeypatch.chdir(tmp_path / "a")
    model = load(folder, base_model="../base")
    assert model.config.base_model_name_or_path == str(tmp_path / "base")
