"""Tables and plots of this device's records.

    python -m bench.report

Writes `tables.md` and `sampling.png` beside the records, from nothing but them.
"""

import json

from autodeco_fast.files import atomic_write, write_text
from bench.harness import RESULTS, ROOT, device_slug, markdown

COLOURS = {"sample": "#c2410c", "transformers": "#475569"}
OTHERS = ("#0f766e", "#7c3aed", "#a16207", "#be185d", "#1d4ed8")


def tables(records: dict[str, dict]) -> str:
    """Every record as a Markdown table, under what it was taken on."""
    parts = ["# Records\n\nMade by `python -m bench.report` from the JSON files beside it."]
    for name, record in records.items():
        machine = record["machine"]
        facts = {k: v for k, v in record.items() if k not in ("machine", "rows")}
        versions = ", ".join(
            f"{k} {machine[k]}" for k in ("python", "torch", "triton", "transformers")
        )
        on = f"{machine['device']}, {machine['threads']} threads; {versions}; commit {machine['commit']}, {machine['date']}"
        settings = "; ".join(
            f"{k} = {v:.4g}" if isinstance(v, float) else f"{k} = {v}" for k, v in facts.items()
        )
        parts.append(
            f"## {name}\n\n{on}\n\n"
            + (f"{settings}\n\n" if settings else "")
            + markdown(record["rows"])
        )
    return "\n\n".join(parts) + "\n"


def draw_sampling(path, record: dict) -> None:
    """Microseconds against rows, for peaked and flat logits of the first vocabulary, with the time
    of one read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    V = record["rows"][0]["V"]
    of_this_size = [
        row for row in record["rows"] if row["V"] == V and row["sampler"] != "logits.amax(-1)"
    ]
    kinds = list(dict.fromkeys(row["logits"] for row in of_this_size))
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds):
        rows = [row for row in of_this_size if row["logits"] == kind]
        spare = iter(OTHERS)
        for name in dict.fromkeys(row["sampler"] for row in rows):
            mine = [row for row in rows if row["sampler"] == name]
            B = [row["B"] for row in mine]
            colour = COLOURS.get(name) or next(spare)
            axes.plot(B, [row["us"] for row in mine], "o-", color=colour, ms=4, label=name)
            axes.fill_between(
                B,
                [row["p20"] for row in mine],
                [row["p80"] for row in mine],
                color=colour,
                alpha=0.2,
                lw=0,
            )
        ours = [row for row in rows if row["sampler"] == "sample"]
        limit = [row["us"] * row["share_of_one_read"] for row in ours]
        axes.plot(
            [row["B"] for row in ours],
            limit,
            "--",
            color="black",
            lw=1,
            label="one read of the logits",
        )
        axes.set(xscale="log", yscale="log", xlabel="rows", title=f"{kind} logits")
        axes.set_xticks([row["B"] for row in ours], [str(row["B"]) for row in ours])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("µs a call")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(f"V = {V:,}, {record['dtype']}, {record['machine']['device']}", fontsize=10)
    atomic_write(path, lambda draft: figure.savefig(draft, dpi=130, format="png"))


def main() -> None:
    folder = RESULTS / device_slug()
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not records:
        raise SystemExit(f"no records in {folder}: run `make bench` first")
    write_text(folder / "tables.md", tables(records))
    if "sampling" in records:
        draw_sampling(folder / "sampling.png", records["sampling"])
    print(f"written: tables.md and plots in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
