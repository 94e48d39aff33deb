"""AutoDeco checkpoints as models: loaded, run, saved. What is expected is written out by hand."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Mxfp4Config,
    Trainer,
    TrainingArguments,
)

from autodeco_fast import AutoDecoConfig, AutoDecoModelForCausalLM
from autodeco_fast.autodeco import loading
from tests import autodeco_checkpoints as released
from tests.autodeco_checkpoints import (
    FAMILIES,
    base_folder,
    base_model,
    base_tensors,
    every_family,
    flat_config,
    head_tensors,
    heads_only,
    merged,
    mlp,
    predicted,
)
from tests.reference import autodeco as reference
from tests.tiny_models import prompts

LAYOUTS = ("heads", "merged", "sharded")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
load = AutoDecoModelForCausalLM.from_pretrained


@pytest.fixture
def model(checkpoint):
    return load(checkpoint("llama"))


@torch.no_grad()
def every_position(base, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the output embedding and the logits, `[N, H]` and `[N, V]`."""
    seen = []
    with base.get_output_embeddings().register_forward_pre_hook(lambda _, a: seen.append(a[0])):
        logits = base(input_ids=ids).logits
    return seen[0].flatten(0, 1), logits.flatten(0, 1)


# Loading


@every_family
@every_layout
def test_a_checkpoint_is_its_base_with_two_heads(checkpoint, family, layout):
    model, base, ids = load(checkpoint(family, layout)), base_model(family), prompts(2, 12)
    with torch.no_grad():
        output = model(ids)
    h, z = every_position(base, ids)
    assert torch.equal(output.logits, base(ids).logits)
    T, P = predicted(head_tensors(), h, z)
    assert T.max() - T.min() > 0.5
    assert P.max() - P.min() > 0.3
    torch.testing.assert_close(output.temp_logits, T.view(2, 12, 1))
    torch.testing.assert_close(output.top_p_logits, P.view(2, 12, 1))
    assert output.hidden_states is None
    assert output.loss is None
    assert not model.training
    assert not any(p.requires_grad for p in model.llm.parameters())


@every_layout
def test_the_auto_classes_know_such_checkpoints(checkpoint, layout):
    folder = checkpoint("qwen3", layout)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is AutoDecoConfig
    assert config.base_config().model_type == "qwen3"
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, enable_top_p_head=False, **options)
    assert type(model) is AutoDecoModelForCausalLM
    assert model.top_p_head is None
    assert model.llm.config._attn_implementation == "eager"
    assert model.llm.dtype == torch.bfloat16
    assert model.temp_head.mlp[0].weight.dtype == torch.float


def test_the_heads_have_a_dtype_of_their_own(checkpoint):
    model = load(checkpoint("llama"), dtype=torch.bfloat16, heads_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    output = model(prompts())
    assert output.logits.dtype == torch.bfloat16
    assert output.temp_logits.dtype == output.top_p_logits.dtype == torch.float32


@pytest.mark.parametrize("layout", ["heads", "merged"])
def test_what_the_base_is_loaded_with_reaches_its_loader(checkpoint, layout, monkeypatch):
    seen, original = [], loading.causal_lm.load
    monkeypatch.setattr(
        loading.causal_lm, "load", lambda name, **k: seen.append(k) or original(name, **k)
    )
    model = load(checkpoint("llama", layout), device_map="cpu", quantization_config=None)
    assert seen[0]["device_map"] == "cpu"
    assert "quantization_config" in seen[0]
    assert model.device == model.temp_head.mlp[0].weight.device == torch.device("cpu")


def test_a_base_spread_over_devices_takes_its_heads_along(checkpoint, tmp_path):
    spread = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    spread |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    folder = checkpoint("qwen2", "merged")
    model = load(folder, device_map=spread, offload_folder=tmp_path)
    assert model.hf_device_map["llm.model.layers.1"] == "disk"
    assert model.hf_device_map["temp_head"] == torch.device("cpu")
    ids = prompts()
    expected = load(folder)
    assert torch.equal(model(ids).top_p_logits, expected(ids).top_p_logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=3, seed=1),
        expected.generate(ids, max_new_tokens=3, seed=1),
    )


def test_a_checkpoint_on_the_hub_is_downloaded(checkpoint, monkeypatch):
    asked, local = [], str(checkpoint("llama", "merged"))

    def download(name: str, allow_patterns: list[str], **options) -> str:
        asked.append((name, options))
        return local

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load("user/checkpoint", revision="v1", token="t")
    assert set(map(repr, asked)) == {repr(("user/checkpoint", {"revision": "v1", "token": "t"}))}
    assert torch.equal(model(prompts()).logits, base_model("llama")(prompts()).logits)


@pytest.mark.parametrize("layout", ["heads", "merged"])
def test_a_configuration_that_was_saved_twice_has_lost_the_type_of_its_base(
    checkpoint, layout, tmp_path
):
    base = checkpoint("gemma2", "base")
    config = flat_config(base, base_model_type="autodeco")  # what the released code leaves
    folder = {"heads": heads_only, "merged": merged}[layout](tmp_path / "a", base, config=config)
    assert torch.equal(load(folder)(prompts()).logits, base_model("gemma2")(prompts()).logits)
    config["base_model_name_or_path"] = "gone/away"
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder, base_model=base)
    assert model.config.base_model_type == "gemma2"


def test_older_spellings_of_a_base_are_read(checkpoint, tmp_path):
    base = checkpoint("llama", "base")
    config = flat_config(base)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": "float32"}
    del config["dtype"]
    model = load(merged(tmp_path / "a", base, config=config))
    assert torch.equal(model(prompts()).logits, base_model("llama")(prompts()).logits)
    assert model.config.rope_parameters == rope


def test_a_model_is_made_of_a_configuration_alone_and_on_no_device(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint("gpt_oss"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.llm.dtype == torch.bfloat16
    assert {p.dtype for p in model.temp_head.parameters()} == {torch.float32}
    assert torch.equal(model(prompts()).temp_logits, torch.ones(2, 5, 1))  # not trained
    with init_empty_weights():
        assert {p.device.type for p in AutoDecoModelForCausalLM(config).parameters()} == {"meta"}


def test_plain_top_p_heads_are_read(checkpoint, tmp_path):
    base, heads = checkpoint("llama", "base"), head_tensors(enhanced=False)
    config = flat_config(base, enhanced=False)
    model = load(heads_only(tmp_path / "a", base, heads=heads, config=config))
    h, z = every_position(base_model("llama"), prompts())
    _, P = predicted(heads, h, z, enhanced=False)
    torch.testing.assert_close(model(prompts()).top_p_logits.flatten(), P)


# Losses


def labelled(seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids = prompts(3, 14, seed)
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 9:] = -100
    return ids, labels


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_losses_and_their_gradients_are_the_released_ones(checkpoint, family):
    model, (ids, labels) = load(checkpoint(family)).train(), labelled()
    base = base_model(family)
    with torch.no_grad():  # some tokens are easy
        labels[:, 6:8] = base(ids).logits.argmax(-1)[:, 5:7]
    torch.manual_seed(4)
    output = model(ids, labels=labels)
    output.loss.backward()

    h, z = every_position(base, ids)
    y = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1).flatten()
    torch.manual_seed(4)
    easy = (z.argmax(-1) == y) & (torch.rand(len(y)) < 0.6)
    assert easy.any()
    tensors = {name: t.requires_grad_() for name, t in head_tensors().items()}
    T, P = predicted(tensors, h, z)
    temp_loss = reference.temperature_loss(z, T, y, (y >= 0) & ~easy, "unscaled")
    top_p_loss = reference.soft_top_p(z, T, P, y)
    (temp_loss + top_p_loss).backward()
    torch.testing.assert_close(output.temp_loss, temp_loss)
    torch.testing.assert_close(output.top_p_loss, top_p_loss)
    torch.testing.assert_close(output.loss, temp_loss + top_p_loss)
    for name, tensor in tensors.items():
        torch.testing.assert_close(model.get_parameter(name).grad, tensor.grad, msg=name)
    assert all(p.grad is None for p in model.llm.parameters())
    assert not model.llm.training


def test_a_batch_without_a_label_has_a_loss_of_zero(model):
    loss = model(prompts(), labels=torch.full((2, 5), -100)).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_one_head_has_one_loss(checkpoint):
    ids, labels = labelled()
    for flag, own in (
        ("enable_top_p_head", "temp_loss"),
        ("enable_temperature_head", "top_p_loss"),
    ):
        output = load(checkpoint("llama"), **{flag: False})(ids, labels=labels)
        assert output.loss == output[own]
        assert len({"temp_loss", "top_p_loss"} & set(output)) == 1
    assert output.temp_logits is None
    h, z = every_position(base_model("llama"), ids)
    ones = torch.ones(len(h))
    columns = torch.stack([ones, *reference.joint_features(z, ones)], -1)
    P = torch.sigmoid(mlp(head_tensors(), "top_p_head", torch.cat([h, columns], -1)))
    torch.testing.assert_close(output.top_p_logits.flatten(), P)


def test_a_forward_runs_the_lm_head_once_and_on_the_rows_that_are_asked_for(model):
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, a, out: rows.append(out.shape))
    whole, last = model(prompts()), model(prompts(), logits_to_keep=1)
    assert [shape[:2] for shape in rows] == [(2, 5), (2, 1)]
    torch.testing.assert_close(last.top_p_logits, whole.top_p_logits[:, -1:])
    with pytest.raises(ValueError, match=r"labels must be \(2, 1\).*got \(2, 5\)"):
        model(prompts(), labels=prompts(), logits_to_keep=1)


def test_trainer_divides_for_gradient_accumulation(checkpoint, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in prompts(4, 10)]
    learned = []
    for batch, accumulated in ((4, 1), (1, 4)):
        model = load(checkpoint("llama"), enable_temperature_head=False)
        arguments = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        learned.append(model.top_p_head.mlp[2].bias - head_tensors()["top_p_head.mlp.2.bias"])
    assert learned[0] != 0
    torch.testing.assert_close(learned[0], learned[1])


# Saving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
def test_a_merged_checkpoint_is_saved_bit_for_bit(checkpoint, family, sharded, tmp_path):
    folder = checkpoint(family, "merged")
    model = load(folder)
    model.generate(prompts(), max_new_tokens=1)  # attached
    shards = {"max_shard_size": "30KB"} if sharded else {}
    model.save_pretrained(tmp_path / "a", heads_only=False, **shards)
    got, expected = base_tensors(tmp_path / "a"), base_tensors(folder)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    index = tmp_path / "a" / "model.safetensors.index.json"
    assert index.exists() == sharded
    if sharded:
        found = json.loads(index.read_text())
        assert found["weight_map"].keys() == expected.keys()
        size = sum(t.numel() * t.element_size() for t in expected.values())
        assert found["metadata"]["total_size"] == size
    assert_config(tmp_path / "a", flat_config(folder.parent / "base"))
    assert torch.equal(load(tmp_path / "a")(prompts()).logits, model(prompts()).logits)


def assert_config(folder, expected: dict) -> None:
    """That `config.json` has these entries, but for the version that wrote it."""
    got = json.loads((folder / "config.json").read_text())
    assert {**got, "transformers_version": None} == {**expected, "transformers_version": None}


def test_heads_alone_are_saved_bit_for_bit_by_default(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    load(folder).save_pretrained(tmp_path / "a")
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    same = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert same == (folder / "model.safetensors").read_bytes()
    assert_config(tmp_path / "a", flat_config(checkpoint("qwen2", "base")))
    load(tmp_path / "a")


def test_the_base_of_a_merged_checkpoint_is_saved_as_itself(checkpoint, tmp_path):
    model = load(checkpoint("qwen3_moe", "merged"))
    model.llm.save_pretrained(tmp_path)
    expected = base_tensors(checkpoint("qwen3_moe", "base"))
    assert base_tensors(tmp_path).keys() == expected.keys()


# Quantised bases


def quantized_base(folder, monkeypatch):
    """A GPT-OSS base whose experts are mxfp4, as those on the hub."""
    monkeypatch.setitem(released.SHAPE, "intermediate_size", 64)
    base = base_folder(folder, "gpt_oss", dtype=torch.bfloat16)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in base_tensors(base).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, into, out = tensor.shape
        shape = experts, out, into // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).byte()
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator).byte()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (base / "config.json").write_text(json.dumps(config))
    return base


@pytest.mark.parametrize("layout", ["heads", "merged"])
def test_heads_of_a_quantised_base(layout, tmp_path, monkeypatch):
    base = quantized_base(tmp_path / "base", monkeypatch)
    folder = {"heads": heads_only, "merged": merged}[layout](tmp_path / "a", base)
    model = load(folder, quantization_config=Mxfp4Config(dequantize=True))
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert torch.equal(model(prompts()).logits, expected(prompts()).logits)
    with pytest.raises(ValueError, match="was dequantised when it was loaded"):
        model.save_pretrained(tmp_path / "b", heads_only=False)
    assert not (tmp_path / "b").exists()
