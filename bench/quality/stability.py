"""Where each objective learns, drifts or fails: learning rates over four decades, on the sums
language.

    python -m bench.quality.stability FOLDER [--jobs N]

takes the model and texts of `bench.quality.sums_study FOLDER`, trains a head for every objective,
AutoDeco's with each of its tricks switched off in turn, at every rate and seed, from one scan, and
writes the record and the figure `stability`. What the folder has already is not made again.

Objectives have losses of their own, so each is measured by its own, on documents held out:

    lost = (loss − best) / (new − best)

of what there was to gain, the share that a run did not: 0 for the best run of the objective, 1 for
a new head, more for one that is worse than that. Beside it stands how far two seeds end apart.
"""

import argparse
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from pathlib import Path
from statistics import median

import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.run import scan_from_files, train_from_files
from autodeco_fast.training.scan_store import Scan
from bench.machine import RESULTS
from bench.quality.figures import figure
from bench.records import markdown, write

FOLDER = RESULTS / "quality"
SEEDS, RATES, NEW = (0, 1, 2, 3, 4), (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 1e-12
EPOCHS, HELD_OUT, LOOKED_AT = 1, 0.2, 4096
CLOSE = 0.1  # of what there is to gain: a run has arrived
TEMPERATURE = "autodeco_temperature"
VARIANTS: dict[str, dict] = {
    "hinge": {"objective": "min_p_hinge"},
    "hinge, trivial tokens not weighted": {"objective": "min_p_hinge", "easy_weight": "none"},
    "label-free": {"objective": "label_free"},
    "AutoDeco's temperature": {"objective": TEMPERATURE},
    "… no token left out": {"objective": TEMPERATURE, "easy_drop": 0.0},
    "… not weighted": {"objective": TEMPERATURE, "weighting": "none"},
    "… weighted at T": {"objective": TEMPERATURE, "weighting": "scaled"},
}


def config_of(work: Path, variant: str, rate: float, seed: int) -> TrainConfig:
    number = [*VARIANTS].index(variant)
    new = {"max_steps": 1} if rate == NEW else {"num_train_epochs": EPOCHS}
    return TrainConfig(
        scan=work / "every-token",
        output=work / "stability" / f"{number}-{rate:g}-seed{seed}",
        learning_rate=rate,
        eval_fraction=HELD_OUT,
        eval_steps=4,
        seed=seed,
        **VARIANTS[variant],
        **new,
    )


def train(config: TrainConfig) -> None:
    torch.set_num_threads(1)
    if not (config.output / CONFIG_NAME).exists():
        train_from_files(config)


def losses(config: TrainConfig) -> list[tuple[int, float]]:
    """(step, held-out loss) of a run."""
    lines = (config.output / METRICS_NAME).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(one["step"], one["eval_loss"]) for one in found if "eval_loss" in one]


def temperatures(config: TrainConfig, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return TemperatureHead.from_pretrained(config.output)(hidden)


def results_of(work: Path, variant: str, hidden: torch.Tensor) -> list[dict]:
    """One for every rate."""
    new = [losses(config_of(work, variant, NEW, seed))[-1][1] for seed in SEEDS]
    runs = {rate: [config_of(work, variant, rate, seed) for seed in SEEDS] for rate in RATES}
    ends = {rate: [losses(run)[-1][1] for run in some] for rate, some in runs.items()}
    # Each seed holds its own documents out.
    best = [min(found[seed] for found in ends.values()) for seed in range(len(SEEDS))]
    found = []
    for rate, some in runs.items():
        T = [temperatures(run, hidden) for run in some]
        arrived = [
            next((step for step, loss in losses(run) if loss - low <= CLOSE * (start - low)), None)
            for run, low, start in zip(some, best, new)
        ]
        pairs = [(a - b).abs().mean().item() for a, b in combinations(T, 2)]
        found.append(
            {
                "variant": variant,
                "rate": rate,
                "lost": [
                    (end - low) / (start - low) for end, low, start in zip(ends[rate], best, new)
                ],
                "mean_T": [each.mean().item() for each in T],
                "spread_of_T": [each.std().item() for each in T],
                "seeds_apart": sum(pairs) / len(pairs),
                "steps_to_arrive": arrived,
            }
        )
    return found


def draw(path: Path, results: list[dict]) -> None:
    with figure(path, (13, 4.2), 3, sharex=True) as (whole, axes):
        colours = {"hinge": "tab:orange", "label": "tab:green", "AutoDeco": "tab:blue"}
        styles = iter(("-", "--", ":", "-."))
        colour = "black"
        for variant in VARIANTS:
            mine = [one for one in results if one["variant"] == variant]
            if not variant.startswith("…"):
                first = next(name for name in colours if variant.startswith(name))
                colour = colours[first]
                styles = iter(("-", "--", ":", "-."))
                if variant.startswith("hinge, "):
                    next(styles)
            style = {"color": colour, "linestyle": next(styles), "marker": "o", "markersize": 3}
            rates = [one["rate"] for one in mine]
            lost = [max(1e-3, median(one["lost"])) for one in mine]
            axes[0].plot(rates, lost, label=variant, **style)
            axes[1].plot(rates, [one["seeds_apart"] for one in mine], **style)
            axes[2].plot(rates, [median(one["mean_T"]) for one in mine], **style)
        axes[0].axhline(1.0, color="grey", linewidth=0.8)
        axes[0].set(
            xscale="log", yscale="log", ylabel="lost of what there was to gain (1: a new head)"
        )
        axes[1].set(ylabel="mean |T − T'| of two seeds", ylim=(0, None))
        axes[2].set(ylabel="mean T", ylim=(0, 2))
        for axis in axes:
            axis.set_xlabel("learning rate")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        whole.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of bench.quality.sums_study")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    args = parser.parse_args(arguments)
    work = args.folder
    model, texts, scan = (str(work / name) for name in ("model", "texts.jsonl", "every-token"))
    scan_from_files(ScanConfig(model=model, data=texts, output=Path(scan), all_tokens=True))
    configs = [
        config_of(work, variant, rate, seed)
        for variant in VARIANTS
        for rate in (NEW, *RATES)
        for seed in SEEDS
    ]
    # A forked process would inherit the threads of torch, locked as they are.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        list(pool.map(train, configs))
    tokens = Scan(Path(scan)).load()
    hidden = tokens.hidden[:: math.ceil(len(tokens) / LOOKED_AT)]
    results = [one for variant in VARIANTS for one in results_of(work, variant, hidden)]
    print(markdown(results))
    facts = {"seeds": len(SEEDS), "epochs": EPOCHS, "held_out": HELD_OUT, "task": "sums"}
    write(FOLDER / "stability.json", "stability", results, **facts)
    draw(FOLDER / "stability.png", results)


if __name__ == "__main__":
    main()
