"""Heads on disk: a folder with `autodeco_config.json` and `head.safetensors`. Written whole or not at all; no pickle."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CONFIG_NAME, WEIGHTS_NAME = "autodeco_config.json", "head.safetensors"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path in the same folder, then renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    atomic_write(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def save_head(folder: str | os.PathLike, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Weights first, then the configuration that makes them a head."""
    folder = Path(folder)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    atomic_write(folder / WEIGHTS_NAME, lambda draft: save_file(tensors, draft))
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2) + "\n")


def _fetch(name: str) -> Path:
    """A local folder as it is; anything else is an id on the Hugging Face hub."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"head must be a folder or a hub id like 'user/name', got {name!r}, which is no folder")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))


def read_config(folder: str | os.PathLike) -> dict:
    """The configuration of a head.

    Raises:
        ValueError: if there is none, or it is not JSON.
    """
    path = _fetch(os.fspath(folder)) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"head folder {os.fspath(folder)!r} has no {CONFIG_NAME}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def load_head(folder: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and weights of a head.

    Raises:
        ValueError: if the folder, its configuration or its safetensors file is missing or not readable as such.
    """
    config = read_config(folder)
    path = _fetch(os.fspath(folder)) / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"head folder {os.fspath(folder)!r} has no {WEIGHTS_NAME}")
    try:
        return config, load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None
