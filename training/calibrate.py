"""`autodeco-fast calibrate`: from a head and a scan of held-out documents to a head with a
promise."""

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autodeco_fast import TemperatureHead
from autodeco_fast.files import output_folder, write_text
from autodeco_fast.training.conformal import Offset, calibrate, coverage, scores
from autodeco_fast.training.head_folder import (
    CALIBRATION_NAME,
    check_every_token,
    check_fits,
    cut_of,
    training_settings,
)
from autodeco_fast.training.predictions import predict, required
from autodeco_fast.training.scan_store import Scan


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
    T, T_star = predict(head, tokens), required(tokens, min_p)
    result = calibrate(
        scores(T_star, T, head.max_temperature),
        tokens.document.numpy(),
        alpha,
        head.max_temperature,
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
    before = coverage(T_star, T, 0.0, head.max_temperature)
    _say(result, record, before, settings.get("trained_on") == record["data"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _say(result: Offset, record: dict, before: float, same_data: bool) -> None:
    console = Console(stderr=True, markup=False)
    table = Table("", "value", "95 % interval")
    low, high = result.offset_interval
    table.add_row("offset", f"{result.offset:+.4f}", f"{low:+.4f} … {high:+.4f}")
    table.add_row(
        "promised coverage", _percent(1 - result.alpha), " … ".join(map(_percent, result.coverage))
    )
    table.add_row("coverage without offset", _percent(before), "")
    for name, value in record["checks"].items():
        miss = value - (1 - result.alpha)
        table.add_row(
            f"coverage on {name}", _percent(value), f"{100 * miss:+.1f} points from the promise"
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
