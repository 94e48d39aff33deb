"""vLLM's model loaders, wrapped.

vLLM has no hook between a loaded model and its first forward, and dozens of its checks go by the
names of architectures, so neither a model class of our own nor a renamed one would do. What every
model passes is the table of loaders by load format; each loader in it is replaced by a subclass.
Configurations of merged AutoDeco checkpoints go the same way: the table of configuration classes
gets one that answers with the base model's configuration.
"""

import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader import BaseModelLoader, DefaultModelLoader
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from autodeco_fast.autodeco import layout
from autodeco_fast.autodeco.config import AutoDecoConfig
from autodeco_fast.serving.vllm_model import Adaptive, attach
from autodeco_fast.serving.vllm_settings import (
    MERGED,
    SWITCH,
    head_of,
    holds_own_head,
    is_merged,
    load_policy,
    read_settings,
    switched_off,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

_HEADS_OWN = frozenset(f"mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias"))
# Of the engines of this process, by the address of their configuration. Neither is kept alive.
_attached: dict[int, tuple[weakref.ref["VllmConfig"], weakref.ref[Adaptive]]] = {}


def install() -> None:
    """Wraps the loaders of this process, if they are not wrapped yet."""
    table = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    wrapped: dict[type, type] = {}
    for load_format, loader in table.items():
        if not issubclass(loader, _Attaching):
            if loader not in wrapped:
                wrapped[loader] = _wrapped(loader)
            table[load_format] = wrapped[loader]
    _CONFIG_REGISTRY[layout.MODEL_TYPE] = MergedConfig


def is_installed() -> bool:
    """Whether the loaders of this process are wrapped."""
    return issubclass(model_loader._LOAD_FORMAT_TO_MODEL_LOADER["auto"], _Attaching)


def attached(config: "VllmConfig") -> Adaptive | None:
    """What was attached to the model of an engine of this process."""
    known, adaptive = _attached.get(id(config), (None, None))
    return adaptive() if known is not None and known() is config else None


class MergedConfig(AutoDecoConfig):
    """Reads the `config.json` of a merged checkpoint as that of its base model."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        base = AutoDecoConfig(**config_dict).base_config()
        return type(base).from_dict({**base.to_dict(), MERGED: True}, **kwargs)


class _Attaching(BaseModelLoader):
    """In front of every loader: attaches the head to the model that is served."""

    def load_model(
        self, vllm_config: "VllmConfig", model_config: "ModelConfig", prefix: str = ""
    ) -> nn.Module:
        serves = _is_served(vllm_config, model_config, prefix)
        head = head_of(vllm_config) if serves else None
        if is_merged(model_config) and not isinstance(self, _Reading):
            raise ValueError(
                "load_format of a merged AutoDeco checkpoint must be one that reads safetensors "
                f"(auto, hf, safetensors, …), got {self.load_config.load_format!r}"
            )
        policy = None if head is None or switched_off() else load_policy(head)
        model = super().load_model(
            vllm_config=vllm_config, model_config=model_config, prefix=prefix
        )
        if policy is not None:
            fused = read_settings(vllm_config).sampler == "fused"
            adaptive = attach(model, policy, vllm_config, fused=fused)
            _attached[id(vllm_config)] = weakref.ref(vllm_config), weakref.ref(adaptive)
            logger.info("Adaptive decoding with head %s: %s", head, policy)
        elif head is not None:
            logger.warning("Head %s is not used: %s=0", head, SWITCH)
        return model


class _Reading(DefaultModelLoader):
    """In front of loaders of checkpoint files: what is a head's is no weight of the model."""

    def get_all_weights(
        self, model_config: "ModelConfig", model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        weights = super().get_all_weights(model_config, model)
        if is_merged(model_config):
            for name, tensor in weights:
                if not layout.is_head(name):
                    yield name.removeprefix(layout.BASE_PREFIX), tensor
        elif holds_own_head(model_config, self.load_config):
            yield from ((name, tensor) for name, tensor in weights if name not in _HEADS_OWN)
        else:
            yield from weights


def _wrapped(loader: type[BaseModelLoader]) -> type[BaseModelLoader]:
    ours = (_Attaching, _Reading) if issubclass(loader, DefaultModelLoader) else (_Attaching,)
    names = {"__module__": loader.__module__, "__qualname__": loader.__qualname__}
    return type(loader.__name__, (*ours, loader), names)


def _is_served(config: "VllmConfig", model: "ModelConfig", prefix: str) -> bool:
    """Whether a model is the one that is served, and no draft model or part of another."""
    return not prefix and model is config.model_config and model.runner_type == "generate"
