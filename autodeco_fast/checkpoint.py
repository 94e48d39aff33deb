"""Heads on disk: a folder with `autodeco_config.json` and `head.safetensors`.

Written whole or not at all; no pickle.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autodeco_fast.errors import foreign, read_json_object
from autodeco_fast.files import atomic_write, put, write_text
from autodeco_fast.values import finite

CONFIG_NAME, WEIGHTS_NAME = "autodeco_config.json", "head.safetensors"
SETTINGS_NAME = "training.json"  # what `autodeco-fast train` writes beside them


def check_finite(tensors: dict[str, torch.Tensor], where: str) -> None:
    """Refuses NaN and infinite weights.

    Raises:
        ValueError: naming `where` and the first such tensor.
    """
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise ValueError(f"{where} must be finite, {name} holds NaN or infinite values")


def save_head(folder: str | os.PathLike, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Both files whole or not there; weights are never beside another head's configuration.

    Raises:
        ValueError: for weights that are not finite; nothing is written.
    """
    folder = Path(folder)
    check_finite(tensors, f"the weights of a head for {str(folder)!r}")
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".draft-") as made:
        draft = Path(made)
        atomic_write(draft / WEIGHTS_NAME, lambda path: save_file(tensors, path))
        write_text(draft / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        put(draft, folder, last=CONFIG_NAME)


def fetch(
    name: str,
    what: str = "head",
    files: Sequence[str] = (CONFIG_NAME, WEIGHTS_NAME, SETTINGS_NAME),
    **hub: object,
) -> Path:
    """A local folder as it is; anything else is an id on the Hugging Face hub.

    Args:
        what: the setting, for complaints.
        files: those to download, or patterns of them.
        hub: what `snapshot_download` takes besides: revision, token, cache_dir, …

    Raises:
        ValueError: if it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    complaint = f"{what} must be a folder or a hub id like 'user/name', got {name!r}"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{complaint}, which is no folder")
    with foreign(f"{complaint}, which is no folder and not found there"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(files), **hub))


def read_config(folder: Path) -> dict:
    """The configuration of a head.

    Raises:
        ValueError: if there is none, or it is no JSON object.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"head folder {str(folder)!r} has no {CONFIG_NAME}")
    return read_json_object(path)


def training_settings(folder: Path) -> dict:
    """What `autodeco-fast train` wrote beside a head; nothing if the head is from elsewhere.

    Raises:
        ValueError: if it is no JSON object, or a number in it is none.
    """
    path = folder / SETTINGS_NAME
    settings = read_json_object(path) if path.is_file() else {}
    for name in ("min_p", "gravity"):
        if settings.get(name) is not None:
            finite(f"{path}: {name}", settings[name])
    return settings


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a head's tensors, from the file's header alone.

    Raises:
        ValueError: if there is no such file, or it is not a whole safetensors file of
            floating-point tensors.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"head folder {str(folder)!r} has no {WEIGHTS_NAME}")
    with foreign(f"{path} is not a safetensors file"), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
        dtypes = {s.get_dtype() for s in slices.values()}
    if not dtypes <= {"F64", "F32", "F16", "BF16"}:
        found = ", ".join(sorted(dtypes))
        raise ValueError(f"{path} must hold floating-point tensors, got {found}")
    return shapes


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a head whose shapes have been looked at.

    Raises:
        ValueError: if they are not finite.
    """
    path = folder / WEIGHTS_NAME
    with foreign(f"{path} is not a safetensors file"):
        tensors = load_file(path)
    check_finite(tensors, str(path))
    return tensors
