"""`autodeco-fast calibrate`: from a head and a scan of held-out documents to a promise."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import training_settings
from autodeco_fast.files import output_folder, write_text
from autodeco_fast.training.conformal import Offset, calibrate, coverage, scores
from autodeco_fast.training.head_folder import (
    CALIBRATION_NAME,
    check_every_token,
    check_fits,
    min_p_of,
)
from autodeco_fast.training.predictions import predict, required_temperatures
from autodeco_fast.training.scan_store import Scan
from autodeco_fast.urls import Location


def calibrate_from_files(
    head_folder: Path,
    scan_folder: Location,
    *,
    alpha: float = 0.05,
    min_p: float | None = None,
    checks: Sequence[Location] = (),
) -> None:
    """Calibrates the head in its folder, and says how its promise holds on other scans.

    Raises:
        ValueError: for a head and scans that do not fit, or an α out of reach; the head is
            unchanged then.
    """
    if not head_folder.is_dir():
        raise ValueError(f"head must be a folder, got {str(head_folder)!r}, which is none")
    with output_folder(head_folder, "head"):
        _calibrate(head_folder, scan_folder, alpha=alpha, min_p=min_p, checks=checks)


def _calibrate(
    head_folder: Path,
    scan_folder: Location,
    *,
    alpha: float,
    min_p: float | None,
    checks: Sequence[Location],
) -> None:
    head, settings = TemperatureHead.from_pretrained(head_folder), training_settings(head_folder)
    scans = [Scan(folder) for folder in (scan_folder, *checks)]
    for scan in scans:
        check_fits(head, settings, scan)
        check_every_token(scan)
    min_p = min_p_of(head, min_p)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    tokens, limit = scans[0].load(), head.max_temperature
    T, required = predict(head, tokens), required_temperatures(tokens, min_p)
    s = scores(required, T, limit)
    example = scans[0].example(tokens.document).numpy()
    result = calibrate(s, example, alpha=alpha, max_temperature=limit)
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
            required_temperatures(other, min_p),
            predict(head, other),
            offset=result.offset,
            max_temperature=limit,
        )
    head.offset, head.min_p = result.offset, min_p  # the promise is for this cut
    head.save_pretrained(head_folder)
    write_text(head_folder / CALIBRATION_NAME, json.dumps(record, indent=1) + "\n")
    before = coverage(required, T, max_temperature=limit)
    _say(result, record, before)
    if settings.get("trained_on") == record["data"]:
        Console(stderr=True, markup=False).print(
            "warning: the head was trained on this very data; the promise needs documents it has "
            "not seen"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _say(result: Offset, record: dict, before: float) -> None:
    console, promised = Console(stderr=True, markup=False), 1 - result.alpha
    table = Table("", "value", "95 % interval")
    low, high = result.offset_interval
    table.add_row("offset", f"{result.offset:+.4f}", f"{low:+.4f} … {high:+.4f}")
    table.add_row(
        "promised coverage", _percent(promised), " … ".join(map(_percent, result.coverage))
    )
    table.add_row("coverage without offset", _percent(before), "")
    for name, value in record["checks"].items():
        miss = f"{100 * (value - promised):+.1f} points from the promise"
        table.add_row(f"coverage on {name}", _percent(value), miss)
    console.print(table)
    console.print(
        f"{result.tokens:,} tokens of {result.documents:,} documents; alpha can be "
        f"{result.reachable_alpha:.4f} or more. The promise holds for tokens exchangeable with "
        f"these, under Min-P {record['min_p']:g}; intervals resample documents.",
        soft_wrap=True,
    )
