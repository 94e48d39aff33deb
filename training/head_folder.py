"""What lies beside a head in its folder, and whether a head and a scan belong together."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.checkpoint import SETTINGS_NAME, fetch, training_settings
from autodeco_fast.heads import DEFAULT_MIN_P
from autodeco_fast.options import Options
from autodeco_fast.training.scan_store import Scan
from autodeco_fast.values import inner_share

METRICS_NAME, DIAGNOSTICS_NAME = "metrics.jsonl", "diagnostics.jsonl"
CALIBRATION_NAME, SWEEP_NAME = "calibration.json", "sweep.json"
# A resumed run may change what does not change the head; and where its input lies, which
# fingerprints know.
_MAY_CHANGE = {
    *("output", "resume", "save_steps", "save_total_limit", "report_to", "diagnostics"),
    *("generation_batch_size", "scan", "model", "data", "prompts", "rollouts"),
}


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


def min_p_of(head: TemperatureHead, min_p: float | None = None) -> float:
    """The Min-P to use a head with: `min_p`, or else its own, 0.1 where it knows none.

    Another one than its own is warned of.

    Raises:
        ValueError: if it is not in (0, 1).
    """
    known = head.min_p
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


def check_model(head: str | Path, lm_head: Callable[[], str]) -> None:
    """Refuses a head that was trained for another model, where what lies beside it says for which.

    Args:
        head: its folder or hub id.
        lm_head: called for the model's, as `lm_head_fingerprint` has it, if the head knows one.

    Raises:
        ValueError: naming both.
    """
    trained_for = training_settings(fetch(str(head), files=(SETTINGS_NAME,))).get("lm_head")
    if trained_for is None:
        return
    own = lm_head()
    if trained_for != own:
        raise ValueError(
            f"head {str(head)!r} was trained for another model: its lm_head is {trained_for}, not "
            f"{own}"
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
