"""Tables and plots of a device's records.

    python -m bench.report [FOLDER]

of `bench/results`, by default this device's. Writes `tables.md` and `sampling.png` beside the
records, from nothing but them.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from autodeco_fast.files import atomic_write, write_text
from bench.machine import RESULTS, ROOT, device_slug
from bench.records import markdown, results_of

COLOURS = {"sample": "#c2410c", "transformers": "#475569"}
OTHERS = ("#0f766e", "#7c3aed", "#a16207", "#be185d", "#1d4ed8")
MARKERS = "osD^"  # of the others: the next one when their colours are used up
READ = "logits.amax(-1)"


def taken_on(record: dict) -> str:
    """Machine, versions, commit and date."""
    machine, commit = record["machine_info"], record["commit_info"]["id"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("python", "torch", "triton", "transformers"))
    where = f"{machine['device']}, {machine['threads']} threads"
    return f"{where}; {versions}; commit {commit[:12]}, {record['datetime'][:10]}"


def table(results: list[dict]) -> str:
    """What all results share in a line, the rest as a table. Groups are left out: their names
    repeat the shape."""
    shared = {
        key: f"{value:.4g}" if isinstance(value, float) else value
        for key, value in results[0].items()
        if key not in ("variant", "group") and all(one.get(key) == value for one in results)
    }
    line = "; ".join(f"{key} = {value}" for key, value in shared.items())
    hidden = {"group", *shared}
    rest = [{key: value for key, value in one.items() if key not in hidden} for one in results]
    return (f"{line}\n\n" if line else "") + markdown(rest)


def tables(records: dict[str, dict]) -> str:
    """Every record as Markdown, under what it was taken on."""
    blocks = ["# Records\n\nMade by `python -m bench.report` from the JSON files beside it."]
    for name, record in records.items():
        blocks.append(f"## {name}\n\n{taken_on(record)}\n\n{table(results_of(record))}")
    return "\n\n".join(blocks) + "\n"


def sampling_record(records: dict[str, dict]) -> dict | None:
    """The latest record of `sample` on peaked and flat logits."""
    found = [r for r in records.values() if "caches" in results_of(r)[0]]
    return max(found, key=lambda record: record["datetime"], default=None)


def sampling_results(record: dict) -> list[dict]:
    """Of the first vocabulary, with warm caches; on a GPU, where all are cold, with cold ones."""
    results = results_of(record)
    first = results[0]
    return [r for r in results if (r["V"], r["caches"]) == (first["V"], first["caches"])]


def draw_sampling(path: Path, record: dict) -> None:
    """Microseconds against rows, for peaked and flat logits, with the time of one read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = sampling_results(record)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(result["logits"] for result in results))
    for axes, logits in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        axes.set(xscale="log", yscale="log", xlabel="rows", title=f"{logits} logits")
        _draw_one(axes, [r for r in results if r["logits"] == logits and r["variant"] != READ])
    figure.axes[0].set_ylabel("µs a call")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    first, machine = results[0], record["machine_info"]
    title = f"V = {first['V']:,}, {first['dtype']}, {machine['device']}"
    figure.suptitle(title, fontsize=10)
    atomic_write(path, lambda draft: figure.savefig(draft, dpi=130, format="png"))


def styles() -> Iterator[tuple[str, str]]:
    """Markers and colours of the other samplers, however many there are."""
    return itertools.cycle(itertools.product(MARKERS, OTHERS))


def _draw_one(axes, results: list[dict]) -> None:
    spare = styles()
    for name in dict.fromkeys(result["variant"] for result in results):
        mine = [result for result in results if result["variant"] == name]
        batches = [one["B"] for one in mine]
        marker, colour = ("o", COLOURS[name]) if name in COLOURS else next(spare)
        median, low, high = ([1e6 * one[k] for one in mine] for k in ("median", "p20", "p80"))
        axes.plot(batches, median, f"{marker}-", color=colour, ms=4, label=name)
        axes.fill_between(batches, low, high, color=colour, alpha=0.2, lw=0)
    ours = [result for result in results if result["variant"] == "sample"]
    batches = [one["B"] for one in ours]
    limit = [1e6 * one["median"] * one["share_of_limit"] for one in ours]
    axes.plot(batches, limit, "--", color="black", lw=1, label="one read of the logits")
    axes.set_xticks(batches, [str(B) for B in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    folder = RESULTS / (sys.argv[1] if len(sys.argv) > 1 else device_slug())
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not records:
        raise SystemExit(f"no records in {folder}: run `make bench` first")
    write_text(folder / "tables.md", tables(records))
    if record := sampling_record(records):
        draw_sampling(folder / "sampling.png", record)
    print(f"written: tables.md and plots in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
