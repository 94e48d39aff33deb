"""What a server was told about its head.

`additional_config` travels inside vLLM's configuration to every process and enters the hash of
compiled graphs. Without `autodeco_head` there, a head in the model's own folder or repository is
taken: this library's files beside the weights, or those of a merged AutoDeco checkpoint.
"""

import functools
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from autodeco_fast.autodeco import layout
from autodeco_fast.autodeco.folder import read_folder
from autodeco_fast.autodeco.own_heads import OWN_FILES
from autodeco_fast.checkpoint import CONFIG_NAME, fetch
from autodeco_fast.options import Options, documented, option
from autodeco_fast.policies import folder
from autodeco_fast.policies.base import Policy
from autodeco_fast.values import require

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

PREFIX = "autodeco_"
SWITCH = "AUTODECO_FAST_VLLM"  # 0 switches the plugin off
MERGED = "autodeco_merged"  # set on the base's configuration, read from a merged checkpoint


@documented
@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """The keys of `additional_config` that begin with `autodeco_`.

    Raises:
        ValueError: for a value of another type or none of its choices.
    """

    head: str | None = option("folder or hub id of a head, or of an AutoDeco checkpoint", None)
    log: str | None = option("file that predicted temperatures are appended to", None)
    sampler: str = option("who draws", "vllm", choices=("vllm", "fused"))


def switched_off() -> bool:
    """Whether the environment says that models decode as without this library.

    Raises:
        ValueError: for a value other than 0 and 1.
    """
    value = os.environ.get(SWITCH, "1")
    require(value in ("0", "1"), f"the environment variable {SWITCH}", value, "0 or 1")
    return value == "0"


def read_settings(config: "VllmConfig") -> Settings:
    """What `additional_config` says.

    Raises:
        ValueError: for a key that begins with `autodeco_` and is none, or as `Settings`.
    """
    given = config.additional_config if isinstance(config.additional_config, dict) else {}
    own = {name: value for name, value in given.items() if name.startswith(PREFIX)}
    known = [PREFIX + each.name for each in fields(Settings)]
    for name in own:
        if name not in known:
            raise ValueError(f"additional_config keys are {', '.join(known)}, got {name!r}")
    try:
        return Settings(**{name.removeprefix(PREFIX): value for name, value in own.items()})
    except ValueError as error:
        raise ValueError(f"additional_config: {PREFIX}{error}") from None


def is_merged(model: "ModelConfig") -> bool:
    """Whether a model was read from a merged AutoDeco checkpoint."""
    return bool(getattr(model.hf_config, MERGED, False))


def holds_own_head(model: "ModelConfig", load: "LoadConfig") -> bool:
    """Whether a head lies in the model's folder or repository, in this library's format."""
    folder = _own_folder(model, load)
    return folder is not None and (folder / CONFIG_NAME).is_file()


def _own_folder(model: "ModelConfig", load: "LoadConfig") -> Path | None:
    """The model's folder; of a hub id the one in the cache, with the files of heads, of the
    revision that is served. None if the model is neither: vLLM reads more than these.

    Raises:
        ValueError: if the hub does not answer, and its files are not in the cache.
    """
    if Path(model.model).is_dir():
        return Path(model.model)
    return _fetched(
        model.model,
        is_merged(model),
        revision=model.revision,
        token=model.hf_token,
        cache_dir=load.download_dir,
    )


@functools.cache  # a process asks the hub once
def _fetched(name: str, merged: bool, **hub: object) -> Path | None:
    if merged:
        return read_folder(name, "model", wanted=layout.is_head, **hub).folder
    try:
        return fetch(name, "model", OWN_FILES, **hub)
    except ValueError as error:
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        if isinstance(error.__cause__, HFValidationError | RepositoryNotFoundError | None):
            return None
        raise


def head_of(config: "VllmConfig") -> str | None:
    """Folder or hub id of the head that a model is to be served with; None if there is none.

    Raises:
        ValueError: as `read_settings`, or for settings without a head.
    """
    settings, model = read_settings(config), config.model_config
    if settings.head is not None:
        return settings.head
    if is_merged(model) or holds_own_head(model, config.load_config):
        return str(_own_folder(model, config.load_config))
    if settings != Settings():
        raise ValueError(
            "additional_config: autodeco_log and autodeco_sampler need autodeco_head: the model "
            f"{model.model!r} brings no head"
        )
    return None


def load_policy(name: str) -> Policy:
    """The policy of `autodeco_head`; see `policies.folder.load_policy`."""
    return folder.load_policy(name, "autodeco_head")
