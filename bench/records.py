"""Records in pytest-benchmark's JSON: those that `pytest bench` writes are read, those of scripts
written too."""

import argparse
import json
import os
import statistics
from datetime import datetime, timezone
from pathlib import Path

from autodeco_fast.demo import smollm2
from autodeco_fast.files import write_text
from bench.clock import spread
from bench.machine import RESULTS, commit_info, device_slug, machine

TIMES = ("median", "p20", "p80")
_NOT_EXTRA = ("seconds", "variant", "group")


def stats_of(seconds: list[float]) -> dict[str, float]:
    """The plugin's statistics and ours, of the seconds of every round."""
    values, total = sorted(seconds), sum(seconds)
    q1, _, q3 = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {
        "min": values[0],
        "max": values[-1],
        "mean": total / len(values),
        "stddev": statistics.stdev(values) if len(values) > 1 else 0.0,
        "rounds": len(values),
        "median": statistics.median(values),
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "ops": len(values) / total if total else 0.0,
        "total": total,
        "iterations": 1,
        **spread(values),
    }


def reason(error: Exception) -> str:
    """Why a peer is left out, in one line."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line[:200]}"


def _benchmark(result: dict, group: str, facts: dict) -> dict:
    extra = {key: value for key, value in result.items() if key not in _NOT_EXTRA}
    first_text = next((value for value in extra.values() if isinstance(value, str)), group)
    name, group = result.get("variant", first_text), result.get("group", group)
    seconds = result.get("seconds", [])
    seconds = seconds if isinstance(seconds, list) else [seconds]
    return {
        "group": group,
        "name": name,
        "fullname": f"{group}::{name}",
        "extra_info": {**facts, **extra},
        "stats": stats_of(seconds) if seconds else {},
    }


def write(path: Path, name: str, results: list[dict], **facts: object) -> None:
    """A script's record, called `name`: a benchmark a result.

    `seconds`, one number or one a round, become its statistics; `variant`, or else its first text,
    is its name; `group`, or else the record's name, its group. All else, and the facts that all
    share, are its `extra_info`.
    """
    record = {
        "machine_info": machine(),
        "commit_info": commit_info(),
        "benchmarks": [_benchmark(result, name, facts) for result in results],
        "datetime": datetime.now(timezone.utc).isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {os.path.relpath(path)}", flush=True)


def options(description: str) -> argparse.ArgumentParser:
    """Of a script that writes a record."""
    parser = argparse.ArgumentParser(description=" ".join(description.split("\n\n")[0].split()))
    parser.add_argument("--tiny", action="store_true", help="small, to see that it runs")
    parser.add_argument("--output", type=Path, help="file of the record; else bench/results")
    return parser


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Of a script that counts on a model, too: `model_of`."""
    parser.add_argument(
        "--model", help=f"a causal language model to count on, too; else {smollm2.NAME}, if here"
    )


def model_of(args: argparse.Namespace) -> str | None:
    """The model that was named, or SmolLM2 where it is installed."""
    if args.model is not None:
        return args.model
    return str(smollm2.folder()) if smollm2.available() else None


class Recording:
    """A record in this device's folder of `bench/results`, or in the file `output`, that is written
    again with everything added: what ends a script early leaves what it had."""

    def __init__(self, name: str, *, output: Path | None = None):
        self.name, self.results = name, []
        self.path = output or RESULTS / device_slug() / f"{name}.json"

    def add(self, results: list[dict], **facts: object) -> None:
        """Writes the results so far and prints the new ones; all results share the facts."""
        self.results += results
        write(self.path, self.name, self.results, **facts)
        written = results_of(json.loads(self.path.read_text()))
        print(markdown(written[-len(results) :]), flush=True)


def record(name: str, results: list[dict], *, output: Path | None = None, **facts: object) -> None:
    """Prints the results and writes them at once, as `Recording` does."""
    Recording(name, output=output).add(results, **facts)


def results_of(record: dict) -> list[dict]:
    """A dict a benchmark: its group, name, seconds and what it says of itself."""
    return [
        {
            "group": one["group"],
            "variant": one["name"],
            **{key: one["stats"][key] for key in TIMES if key in one["stats"]},
            **one["extra_info"],
        }
        for one in record["benchmarks"]
    ]


_UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


def duration(seconds: float) -> str:
    """With a unit, to three digits."""
    unit = next((unit for unit, size in _UNITS.items() if seconds >= size), "ns")
    value = seconds / _UNITS[unit]
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"


def _cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if column in TIMES:
        return duration(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(results: list[dict]) -> str:
    """A Markdown table; its columns are the keys of all results, in order of appearance."""
    columns = list(dict.fromkeys(key for result in results for key in result))
    cells = ([_cell(key, result.get(key)) for key in columns] for result in results)
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
