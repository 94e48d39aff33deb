"""`AutoDecoModelForCausalLM.from_pretrained`: what it reads, in which order.

The headers of all files and the heads come first, then the base model's configuration, then its
weights: what does not fit is refused before anything large is loaded. The base is loaded by its own
class, from its own folder or from behind `llm.`, so that everything transformers does for that
class (weights converted to other shapes, quantisation, devices, attention kernels) happens as if it
were alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from autodeco_fast import causal_lm
from autodeco_fast.autodeco import layout
from autodeco_fast.autodeco.config import AutoDecoConfig
from autodeco_fast.autodeco.convert import checked_config, head_tensors
from autodeco_fast.autodeco.folder import (
    BASE_CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    ModelFolder,
    read_folder,
    read_optional,
)
from autodeco_fast.autodeco.own_heads import Heads, heads_of
from autodeco_fast.errors import foreign

# Of the hub: for the checkpoint; the base has a revision of its own.
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_FLAGS = ("enable_temperature_head", "enable_top_p_head")
_STRIPPED = {r"^llm\.": ""}
# What the Auto classes pass on, which means nothing here.
_IGNORED = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs")


@dataclass(frozen=True)
class Loaded:
    """The parts of a model."""

    config: AutoDecoConfig
    llm: PreTrainedModel
    heads: Heads
    dequantized: bool  # whether the base's files hold quantised weights and the base does not


def load(
    name: str | os.PathLike,
    config: PreTrainedConfig | None,
    base_model: str | os.PathLike | None,
    options: Mapping,
) -> Loaded:
    """The parts of a checkpoint; see `AutoDecoModelForCausalLM.from_pretrained`."""
    options = {key: value for key, value in options.items() if key not in _IGNORED}
    if options.pop("subfolder", ""):
        raise ValueError("subfolder cannot be used: name the folder itself")
    hub = {key: options.pop(key) for key in _HUB if options.get(key) is not None}
    given = read_folder(os.fspath(name), "checkpoint", **hub)
    given.config.update({flag: options.pop(flag) for flag in _FLAGS if flag in options})
    if config is not None:
        given.config.update({flag: getattr(config, flag) for flag in _FLAGS})
        # The Auto classes move these from the call into the configuration.
        for key in ("attn_implementation", "experts_implementation"):
            if (value := getattr(config, f"_{key}", None)) is not None:
                options.setdefault(key, value)
    settings = checked_config(given)
    heads = heads_of(settings, head_tensors(given))
    hub.pop("revision", None)
    if layout.is_merged(given.tensors):
        llm, stored = _merged_base(given, settings, base_model, options)
        base = settings["base_model_name_or_path"]
    else:
        base = settings["base_model_name_or_path"] if base_model is None else _name(base_model)
        llm, stored = _base(given, settings, base, {**hub, **options})
    width = causal_lm.embedding_width(llm)
    if width != settings["temperature_hidden_size"]:
        raise ValueError(
            f"the heads of {str(given.folder)!r} read hidden states of width "
            f"{settings['temperature_hidden_size']}, those of {type(llm).__name__} have {width}"
        )
    added = {key: settings[key] for key in (*_FLAGS, "use_enhanced_features")}
    config = AutoDecoConfig.of(llm.config, base, hidden_size=width, **added)
    dequantized = _is_quantized(stored) and not _is_quantized(llm.config.to_dict())
    return Loaded(config, llm, heads, dequantized)


def _is_quantized(config: Mapping) -> bool:
    return config.get("quantization_config") is not None


def _name(base_model: str | os.PathLike) -> str:
    """A hub id, or a folder's path from anywhere."""
    given = os.fspath(base_model)
    return os.path.abspath(given) if os.path.isdir(given) else given


def _base(
    given: ModelFolder, settings: Mapping, base: str | None, options: Mapping
) -> tuple[PreTrainedModel, dict]:
    """The model that heads were made for, from its own folder or hub id, and the configuration
    there."""
    where = f"heads-only checkpoint {str(given.folder)!r}"
    if base is None:
        raise ValueError(f"{where} names no base model: pass base_model=")
    complaint = f"base model {base!r} of {where} cannot be loaded; pass base_model= for another one"
    of_hub = {key: options[key] for key in (*_HUB, "trust_remote_code") if key in options}
    with foreign(complaint):
        config = AutoConfig.from_pretrained(base, **of_hub).to_dict()
    layout.check_base(settings, config, f"base model {base!r}")
    options = {"generation_config": _generation_config(given), **options}
    return causal_lm.load(base, what="base model", complaint=complaint, **options), config


def _generation_config(given: ModelFolder) -> GenerationConfig | None:
    """What `generate` takes by default, where the checkpoint says it."""
    settings = read_optional(given.folder, GENERATION_CONFIG_NAME)
    if settings is None:
        return None
    with foreign(f"{given.folder / GENERATION_CONFIG_NAME} cannot be read"):
        return GenerationConfig.from_dict(settings)


def _merged_base(
    given: ModelFolder, settings: dict, base_model: str | os.PathLike | None, options: Mapping
) -> tuple[PreTrainedModel, dict]:
    """The model behind `llm.` in a checkpoint's own files, and its configuration there."""
    folder = str(given.folder)
    if base_model is not None and layout.knows_its_base(settings):
        raise ValueError(
            f"base_model goes with heads alone, checkpoint {folder!r} holds its base model"
        )
    if not layout.knows_its_base(settings):
        settings["base_model_type"] = _lost_type(given, settings, base_model)
    complaint = f"checkpoint {folder!r} cannot be loaded"
    with foreign(complaint):
        config = AutoDecoConfig(**settings).base_config()
    llm = causal_lm.load(
        folder,
        what="checkpoint",
        complaint=complaint,
        known=layout.is_head,
        config=config,
        key_mapping=_STRIPPED,
        **options,
    )
    llm.config.name_or_path = llm.name_or_path = settings["base_model_name_or_path"] or folder
    # What was renamed on the way in would be renamed back when the base is saved on its own.
    conversions = getattr(llm, "_weight_conversions", None) or []
    llm._weight_conversions = [
        each for each in conversions if each.source_patterns != list(_STRIPPED)
    ]
    return llm, settings


def _lost_type(given: ModelFolder, settings: Mapping, base_model: str | os.PathLike | None) -> str:
    """The base's model type where the checkpoint no longer knows it: its configuration's."""
    kept = read_optional(given.folder, BASE_CONFIG_NAME)
    if kept is None:
        base = settings["base_model_name_or_path"] if base_model is None else os.fspath(base_model)
        came = settings["base_model_type"]
        complaint = (
            f"checkpoint {str(given.folder)!r} does not say its base's type (base_model_type is "
            f"{came!r}), and base model {base!r} cannot be read: pass base_model="
        )
        if base is None:
            raise ValueError(complaint)
        with foreign(complaint):
            kept = AutoConfig.from_pretrained(base).to_dict()
    layout.check_base(settings, kept, f"the base model of {str(given.folder)!r}")
    return kept["model_type"]


def heads_device(llm: PreTrainedModel) -> torch.device:
    """Where heads belong: beside the output embedding; where that is offloaded, on the CPU."""
    device = causal_lm.embedding_device(llm)
    return torch.device("cpu") if device.type == "meta" else device


def device_map(llm: PreTrainedModel, heads: torch.device) -> dict | None:
    """Where a model's parts lie, if its base was spread over devices."""
    spread = getattr(llm, "hf_device_map", None)
    if spread is None:
        return None
    own = {prefix.rstrip("."): heads for prefix in layout.HEAD_PREFIXES}
    return {f"llm.{name}".rstrip("."): device for name, device in spread.items()} | own
