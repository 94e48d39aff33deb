"""A head and a scan that fit each other, and what the head predicts there."""

import math
import warnings
from pathlib import Path

import numpy as np
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.errors import read_json_object
from autodeco_fast.heads import DEFAULT_MIN_P
from autodeco_fast.training.base_model import BaseModel, frozen_dtype, load
from autodeco_fast.training.file_names import SETTINGS_NAME
from autodeco_fast.training.scan import lm_head_fingerprint
from autodeco_fast.training.scan_store import Scan, ScanTokens
from autodeco_fast.values import finite, inner_share


def training_settings(folder: Path) -> dict:
    """What `autodeco-fast train` wrote beside a head; nothing if the head is from elsewhere."""
    path = folder / SETTINGS_NAME
    settings = read_json_object(path) if path.is_file() else {}
    for name in ("min_p", "gravity"):
        if name in settings:
            finite(f"{path}: {name}", settings[name])
    return settings


def min_p_of(
    head: TemperatureHead, settings: dict | None = None, min_p: float | None = None
) -> float:
    """The Min-P to use a head with: `min_p`, or else its own.

    Its own is the one that it, or what was written beside it, knows; 0.1 where neither does.
    Another one than its own is warned of.

    Raises:
        ValueError: if it is not in (0, 1).
    """
    known = head.min_p if head.min_p is not None else (settings or {}).get("min_p")
    if min_p is None:
        return inner_share("min_p", DEFAULT_MIN_P if known is None else known)
    if known is not None and known != inner_share("min_p", min_p):
        warnings.warn(
            f"the head was made for Min-P {known:g}: at {min_p:g} nothing was promised of it",
            stacklevel=2,
        )
    return min_p


def check_fits(head: TemperatureHead, settings: dict, scan: Scan) -> None:
    """Refuses a scan of another width, model or tokenizer than the head's.

    Raises:
        ValueError: naming what differs.
    """
    if head.hidden_size != scan.hidden_size:
        raise ValueError(
            f"head has width {head.hidden_size}, scan {str(scan.folder)!r} was made of width "
            f"{scan.hidden_size}"
        )
    for name in ("lm_head", "tokenizer"):
        if settings.get(name, scan.manifest[name]) != scan.manifest[name]:
            raise ValueError(
                f"scan {str(scan.folder)!r} is of another {name} than the head: "
                f"{scan.manifest[name]}, not {settings[name]}"
            )


def check_every_token(scan: Scan) -> None:
    """Refuses a scan from which tokens were left out by difficulty: its shares would mean little.

    Raises:
        ValueError: if there are such.
    """
    if not scan.manifest["settings"]["all_tokens"]:
        raise ValueError(
            f"scan {str(scan.folder)!r} left tokens out by difficulty: scan held-out text with "
            "--all-tokens"
        )


def scanned_model(scan: Scan, model: str | None = None) -> BaseModel:
    """The model that was scanned, from where it was or from `model`.

    Raises:
        ValueError: if there is none, or it is another.
    """
    name = model or scan.manifest["settings"]["model"]
    base = load(name, frozen_dtype("cpu"))
    if lm_head_fingerprint(base) != scan.manifest["lm_head"]:
        raise ValueError(f"model {name!r} is not the one that was scanned: its lm_head is another")
    return base


@torch.inference_mode()
def predict(head: TemperatureHead, tokens: ScanTokens, chunk: int = 8192) -> np.ndarray:
    """T̂ of every token without the head's offset, fp32."""
    offset, head.offset = head.offset, 0.0
    try:
        predicted = [head(h.float()) for h in tokens.hidden.split(chunk)]
    finally:
        head.offset = offset
    return torch.cat(predicted).cpu().numpy()


def required_temperatures(tokens: ScanTokens, min_p: float) -> np.ndarray:
    """T* of every token."""
    return tokens.gap.numpy() / -math.log(min_p)
