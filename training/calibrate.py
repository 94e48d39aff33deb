"""`autodeco-fast calibrate`: from a head and a scan of held-out documents to a head with a
promise."""

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from autodeco_fast import TemperatureHead
from autodeco_fast.errors import read_json_object
from autodeco_fast.files import output_folder, write_text
from autodeco_fast.heads import DEFAULT_MIN_P
from autodeco_fast.training.conformal import Offset, calibrate, coverage, scores
from autodeco_fast.training.loop import SETTINGS_NAME
from autodeco_fast.training.scan_store import Scan, ScanTokens
from autodeco_fast.values import finite, inner_share

CALIBRATION_NAME = "calibration.json"


def training_settings(folder: Path) -> dict:
    """What `autodeco-fast train` wrote beside a head; nothing if the head is from elsewhere."""
    path = folder / SETTINGS_NAME
    settings = read_json_object(path) if path.is_file() else {}
    for name in ("min_p", "gravity"):
        if name in settings:
            finite(f"{path}: {name}", settings[name])
    return settings


def cut_of(
    head: TemperatureHead, settings: dict | None = None, min_p: float | None = None
) -> float:
    """The Min-P cut to use a head with: `min_p`, or the one that it, or what was written beside it,
    knows; 0.1 else.

    Another one than the head's is warned of.

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
    """Refuses a scan from which tokens were left out by difficulty: shares measured on it would
    mean little.

    Raises:
        ValueError: if there are such.
    """
    if not scan.manifest["settings"]["all_tokens"]:
        raise ValueError(
            f"scan {str(scan.folder)!r} left tokens out by difficulty: scan held-out text with "
            "--all-tokens"
        )


@torch.inference_mode()
def predict(head: TemperatureHead, tokens: ScanTokens, chunk: int = 8192) -> np.ndarray:
    """T̂ of every token without the head's offset, fp32."""
    offset, head.offset = head.offset, 0.0
    try:
        parts = [head(h.float()) for h in tokens.hidden.split(chunk)]
    finally:
        head.offset = offset
    return torch.cat(parts).cpu().numpy()


def required(tokens: ScanTokens, min_p: float) -> np.ndarray:
    """T* of every token."""
    return tokens.gap.numpy() / -math.log(min_p)


def calibrate_from_files(
    head_folder: Path, scan_folder: Path, alpha: float, min_p: float | None, checks: list[Path]
) -> None:
    """Calibrates the head in its folder, and says how its promise holds on other scans.

    Raises:
        ValueError: for a head and scans that do not fit, or an α out of reach; the head is
            unchanged then.
    """
    if not head_folder.is_dir():
        raise ValueError(f"head must be a folder, got {str(head_folder)!r}, which is none")
    with output_folder(head_folder, "head"):
        _calibrate(head_folder, scan_folder, alpha, min_p, checks)


def _calibrate(
    head_folder: Path, scan_folder: Path, alpha: float, min_p: float | None, checks: list[Path]
) -> None:
    head, settings = TemperatureHead.from_pretrained(head_folder), training_settings(head_folder)
    scans = [Scan(folder) for folder in (scan_folder, *checks)]
    for scan in scans:
        check_fits(head, settings, scan)
        check_every_token(scan)
    min_p = cut_of(head, settings, min_p)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    tokens = scans[0].load()
    T, need = predict(head, tokens), required(tokens, min_p)
    result = calibrate(
        scores(need, T, head.max_temperature), tokens.document.numpy(), alpha, head.max_temperature
    )
    record = {
        **asdict(result),
        "min_p": min_p,
        "scan": str(scan_folder),
        "data": scans[0].manifest["data"],
        "checks": {},
    }
    for folder, scan in zip(checks, scans[1:]):
        other = scan.load()
        record["checks"][str(folder)] = coverage(
            required(other, min_p), predict(head, other), result.offset, head.max_temperature
        )
    head.offset, head.min_p = result.offset, min_p  # the promise is for this cut
    head.save_pretrained(head_folder)
    write_text(head_folder / CALIBRATION_NAME, json.dumps(record, indent=1) + "\n")
    before = coverage(need, T, 0.0, head.max_temperature)
    _say(result, record, before, settings.get("trained_on") == record["data"])


def _say(result: Offset, record: dict, before: float, same_data: bool) -> None:
    console, percent = Console(stderr=True, markup=False), lambda x: f"{100 * x:.1f} %"
    table = Table("", "value", "95 % interval")
    low, high = result.offset_interval
    table.add_row("offset", f"{result.offset:+.4f}", f"{low:+.4f} … {high:+.4f}")
    table.add_row(
        "promised coverage", percent(1 - result.alpha), " … ".join(map(percent, result.coverage))
    )
    table.add_row("coverage without offset", percent(before), "")
    for name, value in record["checks"].items():
        miss = value - (1 - result.alpha)
        table.add_row(
            f"coverage on {name}", percent(value), f"{100 * miss:+.1f} points from the promise"
        )
    console.print(table)
    console.print(
        f"{result.tokens:,} tokens of {result.documents:,} documents; alpha can be "
        f"{result.reachable_alpha:.4f} or more. "
        f"The promise holds for tokens exchangeable with these, under Min-P {record['min_p']:g}; "
        "intervals resample documents.",
        soft_wrap=True,
    )
    if same_data:
        console.print(
            "warning: the head was trained on this very data; the promise needs documents it has "
            "not seen"
        )
