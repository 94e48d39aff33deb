"""Checkpoints of tiny random models, laid out as AutoDeco's released code lays them out.

What is written here is written out in full and by hand: it is what `autodeco_fast.autodeco` is
compared with, and uses nothing of it.

    base       what AutoModelForCausalLM saves
    heads-only what the trainer leaves: config.json and the two heads in model.safetensors
    merged     what its merge script makes: the base's keys behind `llm.`, heads among them
"""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import tiny_models
from tests.reference.autodeco import joint_features

VOCAB, HIDDEN = tiny_models.VOCAB, 32
SHAPE = {**tiny_models.SHAPE, "hidden_size": HIDDEN}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 8,
}
_OWN = {
    "llama": {"tie_word_embeddings": True},  # as Llama 3.2 1B
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False},
    "qwen3_moe": {"num_experts": 4, **_EXPERTS},
    "gpt_oss": {"num_local_experts": 4, **_EXPERTS, "sliding_window": 8, "rope_parameters": _YARN},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 8},
}
FAMILIES = sorted(_OWN)
every_family = pytest.mark.parametrize("family", FAMILIES)


def base_model(family: str) -> PreTrainedModel:
    """A random model in eval mode whose next-token distributions are neither flat nor one-hot."""
    torch.manual_seed(sum(map(ord, family)))
    config = CONFIG_MAPPING[family](**SHAPE, **_OWN[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name or "bias" in name:  # not zero, so that a lost one is seen
                parameter.normal_(std=0.02)
        model.get_output_embeddings().weight.normal_(std=0.4)
    return model


def base_folder(folder: Path, family: str, *, sharded: bool = False, dtype=torch.float32) -> Path:
    """A saved base model; its files are named as on the hub."""
    model = base_model(family).to(dtype)
    model.save_pretrained(folder, max_shard_size="30KB" if sharded else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return folder


def head_tensors(
    hidden_size: int = HIDDEN, *, enhanced: bool = True, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Both heads, fp32, with temperatures over most of (0, 2) and top-p over most of (0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    tensors = {}
    columns = hidden_size + (5 if enhanced else 1)
    for head, width in (("temp_head", hidden_size), ("top_p_head", columns)):
        tensors |= {
            f"{head}.mlp.0.weight": normal(256, width, std=width**-0.5),
            f"{head}.mlp.0.bias": normal(256, std=0.1),
            f"{head}.mlp.2.weight": normal(1, 256, std=0.15),
            f"{head}.mlp.2.bias": normal(1, std=0.1),
        }
    return tensors


def flat_config(base: Path, *, enhanced: bool = True, **changed) -> dict:
    """The base's configuration flattened, as a checkpoint's `config.json` has it."""
    config = json.loads((base / "config.json").read_text())
    return {
        **config,
        "architectures": ["AutoDecoModelForCausalLM"],
        "model_type": "autodeco",
        "base_model_type": config["model_type"],
        "base_model_name_or_path": str(base),
        "enable_temperature_head": True,
        "enable_top_p_head": True,
        "use_enhanced_features": enhanced,
        "temperature_hidden_size": config["hidden_size"],
        "top_p_hidden_size": config["hidden_size"],
        **changed,
    }


def heads_only(
    folder: Path,
    base: Path,
    *,
    heads: dict[str, torch.Tensor] | None = None,
    config: dict | None = None,
) -> Path:
    """What the trainer leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", flat_config(base) if config is None else config)
    heads = head_tensors() if heads is None else heads
    save_file(heads, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def merged(
    folder: Path,
    base: Path,
    *,
    heads: dict[str, torch.Tensor] | None = None,
    config: dict | None = None,
    sharded: bool = False,
) -> Path:
    """What the merge script makes: no metadata in the files, totals in the index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"llm.{name}": tensor for name, tensor in base_tensors(base).items()}
    tensors |= head_tensors() if heads is None else heads
    split = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size="30KB" if sharded else "5GB",
    )
    assert split.is_sharded == sharded
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    if sharded:
        total = split.metadata["total_size"]
        parameters = sum(tensor.numel() for tensor in tensors.values())
        index = {
            "metadata": {"total_size": total, "total_parameters": parameters},
            "weight_map": split.tensor_to_filename,
        }
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", flat_config(base) if config is None else config)
    return folder


def mlp(tensors: dict, head: str, inputs: torch.Tensor) -> torch.Tensor:
    """A head before its sigmoid, from its tensors."""
    inside = torch.relu(inputs @ tensors[f"{head}.mlp.0.weight"].T + tensors[f"{head}.mlp.0.bias"])
    return (inside @ tensors[f"{head}.mlp.2.weight"].T + tensors[f"{head}.mlp.2.bias"])[..., 0]


def predicted(tensors: dict, h: torch.Tensor, z: torch.Tensor, enhanced: bool = True):
    """T and top-p of `h [N, H]` and `z [N, V]`."""
    T = 2 * torch.sigmoid(mlp(tensors, "temp_head", h))
    features = joint_features(z, T) if enhanced else []
    columns = torch.stack([T.detach(), *features], -1)
    return T, torch.sigmoid(mlp(tensors, "top_p_head", torch.cat([h, columns], -1)))


def base_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
