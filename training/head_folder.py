"""What lies beside a head in its folder, and whether a head and a scan belong together."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.errors import read_json_object
from autodeco_fast.heads import DEFAULT_MIN_P
from autodeco_fast.options import Options
from autodeco_fast.training.scan_store import Scan
from autodeco_fast.values import finite, inner_share

SETTINGS_NAME, METRICS_NAME, DIAGNOSTICS_NAME = (
    "training.json",
    "metrics.jsonl",
    "diagnostics.jsonl",
)
CALIBRATION_NAME, SWEEP_NAME = "calibration.json", "sweep.json"
# A resumed run may change what does not change the head; and where its input lies, which
# fingerprints know.
_MAY_CHANGE = {
    *("output", "resume", "save_steps", "save_total_limit", "report_to", "diagnostics"),
    *("generation_batch_size", "scan", "model", "data", "prompts", "rollouts"),
}


def training_settings(folder: Path) -> dict:
    """What `autodeco-fast train` wrote beside a head; nothing if the head is from elsewhere."""
    path = folder / SETTINGS_NAME
    settings = read_json_object(path) if path.is_file() else {}
    for name in ("min_p", "gravity"):
        if settings.get(name) is not None:
            finite(f"{path}: {name}", settings[name])
    return settings


def written_settings(config: Options, identity: dict[str, object]) -> dict:
    """What `training.json` says of a run: its settings, and what it learns from."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(config).items()
    }
    return json.loads(json.dumps(settings | identity))


def check_resumed(folder: Path, settings: dict) -> None:
    """Refuses to go on in a folder whose run was begun with other settings, or on other data.

    Args:
        settings: the `written_settings` of the run that goes on.

    Raises:
        ValueError: naming the first that differs.
    """
    before = training_settings(folder)
    for name, value in settings.items():
        if name not in _MAY_CHANGE and before.get(name, value) != value:
            raise ValueError(
                f"output {str(folder)!r} was begun with {name} {before[name]}, got {value}: resume "
                "with the same, or name another folder"
            )


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


def check_width(head: TemperatureHead | TopPHead, hidden_size: int) -> None:
    """Refuses a head of another width than the model's output embedding.

    Raises:
        ValueError: naming both.
    """
    if head.hidden_size != hidden_size:
        raise ValueError(
            f"head has width {head.hidden_size}, the model's output embedding takes {hidden_size}"
        )


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


def check_model(folder: Path, lm_head: str) -> None:
    """Refuses a head that was trained for another model, where what lies beside it says for which.

    Args:
        lm_head: the model's, as `lm_head_fingerprint` has it.

    Raises:
        ValueError: naming both.
    """
    trained_for = training_settings(folder).get("lm_head", lm_head)
    if trained_for != lm_head:
        raise ValueError(
            f"head {str(folder)!r} was trained for another model: its lm_head is {trained_for}, "
            f"not {lm_head}"
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
