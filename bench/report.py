"""Tables and plots of this device's records.

    python -m bench.report

Writes `tables.md` and `sampling.png` beside the records, from nothing but them.
"""

import json
from pathlib import Path

from autodeco_fast.files import atomic_write, write_text
from bench.machine import RESULTS, ROOT, device_slug
from bench.records import markdown, rows_of

COLOURS = {"sample": "#c2410c", "transformers": "#475569"}
OTHERS = ("#0f766e", "#7c3aed", "#a16207", "#be185d", "#1d4ed8")
READ = "logits.amax(-1)"


def taken_on(record: dict) -> str:
    """Machine, versions, commit and date."""
    machine, commit = record["machine_info"], record["commit_info"].get("id", "unknown")
    versions = ", ".join(f"{k} {machine[k]}" for k in ("python", "torch", "triton", "transformers"))
    where = f"{machine['device']}, {machine['threads']} threads"
    return f"{where}; {versions}; commit {commit[:12]}, {record['datetime'][:10]}"


def tables(records: dict[str, dict]) -> str:
    """Every record as Markdown, a table a group of columns, under what it was taken on."""
    blocks = ["# Records\n\nMade by `python -m bench.report` from the JSON files beside it."]
    for name, record in records.items():
        blocks.append(f"## {name}\n\n{taken_on(record)}\n\n{markdown(rows_of(record))}")
    return "\n\n".join(blocks) + "\n"


def sampling_rows(records: dict[str, dict]) -> list[dict]:
    """The benchmarks of `sample` with warm caches at the first vocabulary, best record last."""
    found = [
        row
        for record in records.values()
        for row in rows_of(record)
        if row.get("logits") in ("peaked", "flat") and row.get("caches") == "warm"
    ]
    return [row for row in found if row["V"] == found[0]["V"]]


def draw_sampling(path: Path, rows: list[dict], machine: dict) -> None:
    """Microseconds against rows, for peaked and flat logits, with the time of one read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    logits = list(dict.fromkeys(row["logits"] for row in rows))
    for axes, shape in zip(figure.subplots(1, len(logits), sharey=True), logits):
        _draw_one(axes, [row for row in rows if row["logits"] == shape and row["variant"] != READ])
        axes.set(xscale="log", yscale="log", xlabel="rows", title=f"{shape} logits")
    figure.axes[0].set_ylabel("µs a call")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    first = rows[0]
    title = f"V = {first['V']:,}, {first['dtype']}, {machine['device']}"
    figure.suptitle(title, fontsize=10)
    atomic_write(path, lambda draft: figure.savefig(draft, dpi=130, format="png"))


def _draw_one(axes, rows: list[dict]) -> None:
    spare = iter(OTHERS)
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        batches, colour = [row["B"] for row in mine], COLOURS.get(name) or next(spare)
        median, low, high = ([row[f"{k} µs"] for row in mine] for k in ("median", "p20", "p80"))
        axes.plot(batches, median, "o-", color=colour, ms=4, label=name)
        axes.fill_between(batches, low, high, color=colour, alpha=0.2, lw=0)
    ours = [row for row in rows if row["variant"] == "sample"]
    batches = [row["B"] for row in ours]
    limit = [row["median µs"] * row["share_of_limit"] for row in ours]
    axes.plot(batches, limit, "--", color="black", lw=1, label="one read of the logits")
    axes.set_xticks(batches, [str(B) for B in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    folder = RESULTS / device_slug()
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not records:
        raise SystemExit(f"no records in {folder}: run `make bench` first")
    write_text(folder / "tables.md", tables(records))
    if rows := sampling_rows(records):
        machine = next(iter(records.values()))["machine_info"]
        draw_sampling(folder / "sampling.png", rows, machine)
    print(f"written: tables.md and plots in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
