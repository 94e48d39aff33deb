"""`save_pretrained` of AutoDeco models: what it replaces and refuses, what can be read back."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from autodeco_fast import AutoDecoConfig, AutoDecoModelForCausalLM, TemperatureHead, TopPHead
from tests.autodeco_checkpoints import HIDDEN, base_model
from tests.checkpoint_folders import contents, same_tensors
from tests.commands import listing
from tests.tiny_models import prompts

load = AutoDecoModelForCausalLM.from_pretrained
NAMES = {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def model(checkpoint):
    return load(checkpoint("llama"))


def test_saving_replaces_what_lay_there(checkpoint, tmp_path):
    model = load(checkpoint("llama", "sharded"))
    model.save_pretrained(tmp_path, heads_only=False, max_shard_size="30KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, heads_only=False)
    assert {path.name for path in tmp_path.iterdir()} == NAMES | {"notes.txt"}
    torch.nn.init.constant_(model.temp_head.mlp[2].bias, torch.nan)
    before = (tmp_path / "model.safetensors").read_bytes()
    for heads_only in (False, True):
        with pytest.raises(ValueError, match=r"temp_head\.mlp\.2\.bias holds NaN|holds a base"):
            model.save_pretrained(tmp_path, heads_only=heads_only)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_heads_alone_replace_heads_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.nn.init.constant_(model.temp_head.mlp[2].bias, 0.5)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == NAMES
    assert load_file(tmp_path / "model.safetensors")["temp_head.mlp.2.bias"] == 0.5
    before = (tmp_path / "model.safetensors").read_bytes()
    torch.nn.init.constant_(model.temp_head.mlp[2].bias, torch.nan)
    with pytest.raises(ValueError, match=r"temp_head\.mlp\.2\.bias holds NaN"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def _bare(folder) -> None:
    """What an interrupted save leaves: weights without a configuration."""
    (folder / "config.json").unlink()


def _pickled(folder) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("layout", "spoil"),
    [
        ("merged", None),
        ("sharded", None),
        ("base", None),
        ("merged", _bare),
        ("sharded", _bare),
        ("base", _bare),
        ("base", _pickled),
    ],
)
def test_heads_alone_do_not_take_a_base_models_place(checkpoint, layout, spoil, tmp_path):
    model = AutoDecoModelForCausalLM(
        AutoDecoConfig.of(base_model("llama").config, "someone/base"), llm=base_model("llama")
    )
    if layout == "base":
        model.llm.save_pretrained(tmp_path)
    else:
        shards = {"max_shard_size": "30KB"} if layout == "sharded" else {}
        model.save_pretrained(tmp_path, heads_only=False, **shards)
    if spoil is not None:
        spoil(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"holds a base model.* or pass heads_only"):
        model.save_pretrained(tmp_path)
    assert listing(tmp_path) == before


def test_heads_alone_are_not_saved_where_their_base_is_said_to_lie(tmp_path, monkeypatch):
    base = base_model("llama")
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to("base")
    monkeypatch.chdir(tmp_path)
    model = AutoDecoModelForCausalLM(AutoDecoConfig.of(base.config, "link"), llm=base)
    with pytest.raises(ValueError, match="save_directory 'base' holds a base model"):
        model.save_pretrained("base")
    assert not any((tmp_path / "base").iterdir())


def test_heads_whose_base_has_no_name_are_not_saved_alone(tmp_path):
    base = base_model("llama")
    model = AutoDecoModelForCausalLM(AutoDecoConfig.of(base.config, None), llm=base)
    with pytest.raises(ValueError, match="heads alone need the name of their base"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a", heads_only=False)
    assert torch.equal(load(tmp_path / "a")(prompts()).logits, base(prompts()).logits)


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [
        ("temp_head", lambda: TemperatureHead(HIDDEN, offset=0.4), "offset .of calibration. must"),
        ("temp_head", lambda: TemperatureHead(HIDDEN, max_temperature=1.0), "max_temperature must"),
        ("temp_head", lambda: TemperatureHead(HIDDEN, 64), "intermediate_size must be 256, all"),
        ("temp_head", lambda: TemperatureHead(8), "has width 8, the base 32"),
        ("temp_head", lambda: torch.nn.Linear(HIDDEN, 1), "must be a TemperatureHead, got 'Linear"),
        ("top_p_head", lambda: TopPHead(HIDDEN, intermediate_size=64), "intermediate_size must"),
        ("top_p_head", lambda: TopPHead(8), "has width 8, the base 32"),
    ],
)
@pytest.mark.parametrize("heads_only", [True, False], ids=["heads", "merged"])
def test_heads_that_the_format_cannot_express(model, tmp_path, name, head, words, heads_only):
    setattr(model, name, head())
    with pytest.raises(ValueError, match=f"^{name}.*{words}"):
        model.save_pretrained(tmp_path / "a", heads_only=heads_only)
    assert not (tmp_path / "a").exists()


def test_a_model_without_heads_is_no_checkpoint(model, tmp_path):
    model.temp_head = model.top_p_head = None
    with pytest.raises(ValueError, match="temp_head and top_p_head must not both be None"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_state_dict_with_half_a_head_is_refused(model, tmp_path):
    state = model.state_dict()
    del state["temp_head.mlp.2.bias"]
    with pytest.raises(ValueError, match=r"has no tensor 'temp_head\.mlp\.2\.bias'"):
        model.save_pretrained(tmp_path / "a", state_dict=state)
    assert not (tmp_path / "a").exists()


def test_a_head_that_was_made_for_a_cut_warns(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "a")
    model.temp_head = TemperatureHead(HIDDEN, min_p=0.05)
    with pytest.warns(UserWarning, match="give min_p=0.05, which temp_head was made for") as seen:
        model.save_pretrained(tmp_path / "a")
    assert seen[0].filename == __file__


@pytest.mark.parametrize("heads_only", [True, False], ids=["heads", "merged"])
def test_the_heads_say_what_is_written(checkpoint, tmp_path, heads_only):
    """Whatever the configuration that the model was made with."""
    model, ids = load(checkpoint("llama")), prompts()
    model.top_p_head = None
    model.save_pretrained(tmp_path / "a", heads_only=heads_only)
    one = load(tmp_path / "a")
    assert one.top_p_head is None
    assert torch.equal(one(ids).temp_logits, model(ids).temp_logits)
    one.temp_head, one.top_p_head = None, TopPHead(HIDDEN, use_enhanced_features=False)
    one.save_pretrained(tmp_path / "b", heads_only=heads_only)
    other = load(tmp_path / "b")
    assert other.temp_head is None
    assert same_tensors(other.top_p_head.state_dict(), one.top_p_head.state_dict())
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["use_enhanced_features"] is False


def test_what_plain_models_take_is_taken(model, tmp_path):
    model.save_pretrained(tmp_path / "a", False)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a", True, model.state_dict())
    model.save_pretrained(tmp_path / "b", save_function=torch.save, safe_serialization=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_base_of_another_width_is_refused():
    base = base_model("llama")
    config = AutoDecoConfig.of(base.config, "some/base", hidden_size=16)
    with pytest.raises(ValueError, match=r"must be 32 both, .* LlamaForCausalLM, got \(16, 16\)"):
        AutoDecoModelForCausalLM(config, llm=base)
