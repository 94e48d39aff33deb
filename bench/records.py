"""Records in pytest-benchmark's JSON: what `pytest bench` writes, and scripts beside it."""

import json
import os
from datetime import datetime, timezone
from pathlib import Path

from autodeco_fast.files import write_text
from bench.machine import RESULTS, device_slug, machine


def _commit_info() -> dict:
    """As the plugin writes it; empty where it is not installed, as on bare GPU machines."""
    try:
        from pytest_benchmark.utils import get_commit_info
    except ImportError:
        return {}
    return get_commit_info()


def write(path: Path, rows: list[dict], **facts) -> None:
    """One record of a script: a benchmark a row, which holds `seconds`, `p20`, `p80` if it has a
    time, and what else is known of it."""
    benchmarks = []
    for row in rows:
        extra = {k: v for k, v in row.items() if k not in ("seconds", "p20", "p80")}
        times = {k: row[k] for k in ("p20", "p80") if k in row}
        stats = {"median": row["seconds"], **times} if "seconds" in row else {}
        name = next((str(v) for v in row.values() if isinstance(v, str)), path.stem)
        benchmarks.append(
            {
                "group": path.stem,
                "name": name,
                "fullname": f"{path.stem}::{name}",
                "extra_info": {**facts, **extra},
                "stats": stats,
            }
        )
    record = {
        "machine_info": machine(),
        "commit_info": _commit_info(),
        "benchmarks": benchmarks,
        "datetime": datetime.now(timezone.utc).isoformat(),
    }
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {os.path.relpath(path)}", flush=True)


def record(name: str, rows: list[dict], **facts) -> None:
    """Prints the rows and writes them to this device's folder of `bench/results`."""
    print(markdown(rows), flush=True)
    write(RESULTS / device_slug() / f"{name}.json", rows, **facts)


_TIMES = ("median", "p20", "p80")


def rows_of(record: dict) -> list[dict]:
    """A row a benchmark: its group, name, µs and what it says of itself."""
    return [
        {
            "group": one["group"],
            "variant": one["name"],
            **{f"{k} µs": 1e6 * v for k, v in one["stats"].items() if k in _TIMES},
            **one["extra_info"],
        }
        for one in record["benchmarks"]
    ]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def markdown(rows: list[dict]) -> str:
    """A Markdown table; its columns are the keys of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = ([_cell(row.get(key)) for key in columns] for row in rows)
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
