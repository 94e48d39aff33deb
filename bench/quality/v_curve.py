"""How closely T follows the width of the model's own nucleus: SmolLM2, with labels and without.

    python -m bench.quality.v_curve FOLDER [--model FOLDER]

scans a part of Python's reference manual, trains heads for five seeds at two Min-P and writes the
record and the figure `v_curve`. What the folder has already is not made again.

All that the label-free loss sees of a row is the mass of its kept set at each T. The LM head runs
once over the scan, that mass is written down on a grid of T, and heads train from it in seconds:
`nucleus_width_loss` but for the grid (`tests/test_quality.py` compares them). Rank correlations are
over the tokens of documents held out from each seed. Beside the heads' stands that of the loss's
own minimiser: what a head without limits on its capacity and its data would have.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from autodeco_fast import TemperatureHead
from autodeco_fast.files import atomic_write, write_text
from autodeco_fast.training.config import ScanConfig
from autodeco_fast.training.loop import learning_rate
from autodeco_fast.training.measures import scanned_model
from autodeco_fast.training.report_data import VCurve, spearman, v_curve
from autodeco_fast.training.report_figures import v_curves
from autodeco_fast.training.run import scan_from_files
from autodeco_fast.training.scan_store import Scan, ScanTokens, read_manifest
from autodeco_fast.training.token_uniform import held_out
from bench.machine import RESULTS
from bench.quality.arguments import parsed
from bench.quality.records_study import documents
from bench.records import write

FOLDER = RESULTS / "quality"
SEEDS, GRAVITY, DOCUMENTS, HELD_OUT = (0, 1, 2, 3, 4), 0.1, 90, 0.2
# The second reaches 2·3.9 nats below the maximum.
MIN_PS = (0.1, 0.02)
EPOCHS, BATCH, RATE, WARMUP = 3, 256, 2e-3, 0.05
STEPS, WIDEST = 256, 12.0  # of the grid, and its last gap in nats
TOP = 4096  # tokens of a row that are looked at; nuclei end before, and what is left is within 1 %


def scanned(work: Path, model: str) -> Scan:
    """Every token of some documents."""
    folder = work / "scan"
    if not (folder / "scan.json").exists() or "counts" not in read_manifest(folder):
        texts = documents()
        random.Random(0).shuffle(texts)
        lines = (json.dumps({"text": text}) + "\n" for text in texts[:DOCUMENTS])
        write_text(work / "documents.jsonl", "".join(lines))
        options = {"all_tokens": True, "examples_per_shard": 6, "batch_tokens": 1500}
        data = str(work / "documents.jsonl")
        scan_from_files(ScanConfig(model=model, data=data, output=folder, **options))
    return Scan(folder)


def masses(logits: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows `[n, V]`: the probability of tokens whose gap is at most that of each step of the
    grid, `[n, STEPS + 1]`, and the gap of the last token of the nucleus of this mass, `[n]`."""
    top = logits.topk(min(TOP, logits.shape[1]), -1).values
    p, gap = (top - logits.logsumexp(-1, keepdim=True)).exp(), top[:, :1] - top
    last = (p.cumsum(-1) < mass).sum(-1).clamp(max=top.shape[1] - 1)
    step = (gap / WIDEST * STEPS).ceil().long().clamp(max=STEPS + 1)
    found = torch.zeros(len(top), STEPS + 2).scatter_add_(1, step, p)
    return found[:, :-1].cumsum(-1), gap.gather(1, last[:, None])[:, 0]


@torch.inference_mode()
def table(work: Path, scan: Scan, tokens: ScanTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """`masses` of all tokens of the scan, for the nucleus of mass 1 − λ."""
    path = work / "table.safetensors"
    if not path.exists():
        base = scanned_model(scan)
        rows = [masses(base.logits(h).float(), 1 - GRAVITY) for h in tokens.hidden.split(64)]
        mass, gap = (torch.cat(column) for column in zip(*rows))
        atomic_write(path, lambda draft: save_file({"mass": mass.half(), "gap": gap}, draft))
    found = load_file(path)
    return found["mass"].float(), found["gap"]


def slope(T: torch.Tensor, mass: torch.Tensor, *, min_p: float, limit: float) -> torch.Tensor:
    """Of `nucleus_width_loss` in T: the mass of the kept set less 1 − λ of the mass within reach;
    linear between the steps of the grid. `[n]`"""

    def at(T: torch.Tensor) -> torch.Tensor:
        x = T * (-math.log(min_p) / WIDEST * STEPS)
        low = x.floor().long().clamp(max=STEPS - 1)
        left, right = (mass.gather(1, low[:, None] + k)[:, 0] for k in (0, 1))
        return left + (x - low) * (right - left)

    return at(T) - (1 - GRAVITY) * at(torch.full_like(T, limit))


def minimiser(mass: torch.Tensor, *, min_p: float, limit: float) -> torch.Tensor:
    """Where the loss is lowest, to a step of the grid. `[n]`"""
    width = -math.log(min_p)
    T = torch.arange(STEPS + 1) * (WIDEST / STEPS / width)
    within = mass[:, : int((limit + 1e-6) / T[1]) + 1]
    return T[(within < (1 - GRAVITY) * within[:, -1:]).sum(-1)]


@dataclass
class Data:
    """What heads of one seed learn from and are measured on."""

    hidden: torch.Tensor  # [n, H]
    mass: torch.Tensor  # [n, STEPS + 1]
    gap: torch.Tensor  # [n] of the text's own token
    nucleus: torch.Tensor  # [n] gap of the last token of the nucleus
    out: torch.Tensor  # [n] bool, held out


def label_free(T: torch.Tensor, data: Data, rows: torch.Tensor, min_p: float) -> torch.Tensor:
    """Its gradient is the slope."""
    return (T * slope(T.detach(), data.mass[rows], min_p=min_p, limit=2.0)).mean()


def hinge(T: torch.Tensor, data: Data, rows: torch.Tensor, min_p: float) -> torch.Tensor:
    required = data.gap[rows] / -math.log(min_p)
    loss = (required - T).relu() + GRAVITY * T
    return loss[required <= 2.0].mean()


LOSSES: dict[str, Callable] = {"label-free": label_free, "hinge": hinge}


def trained(name: str, data: Data, *, min_p: float, seed: int) -> TemperatureHead:
    torch.manual_seed(seed)
    head, learn = TemperatureHead(data.hidden.shape[1], min_p=min_p), (~data.out).nonzero()[:, 0]
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    batches = [
        rows for _ in range(EPOCHS) for rows in learn[torch.randperm(len(learn))].split(BATCH)
    ]
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate(step, len(batches), warmup_ratio=WARMUP)
        optimizer.zero_grad()
        LOSSES[name](head(data.hidden[rows]), data, rows, min_p).backward()
        optimizer.step()
    return head


def measured(
    name: str, data: Data, *, min_p: float, seed: int
) -> tuple[dict, tuple[VCurve, VCurve]]:
    """A head's result, or that of the minimiser, and T against T* and against the nucleus."""
    width, limit = -math.log(min_p), 2.0
    required, nucleus = (x[data.out].numpy() / width for x in (data.gap, data.nucleus))
    seen = None
    if name == "minimiser":
        T = minimiser(data.mass[data.out], min_p=min_p, limit=limit).numpy()
    else:
        head = trained(name, data, min_p=min_p, seed=seed)
        with torch.no_grad():
            every = head(data.hidden).numpy()
        T, learn = every[data.out], (~data.out).numpy()
        seen = spearman(data.nucleus.numpy()[learn], every[learn])
    curves = v_curve(required, T, limit), v_curve(nucleus, T, limit)
    result = {
        "variant": f"{name}, Min-P {min_p:g}, seed {seed}",
        "objective": name,
        "min_p": min_p,
        "seed": seed,
        "spearman_nucleus_width": curves[1].spearman,
        "spearman_required_temperature": curves[0].spearman,
        "spearman_nucleus_width_on_training_tokens": seen,
        "nuclei_within_reach": curves[1].reachable,
        "temperature": float(np.mean(T)),
        "held_out_tokens": len(T),
    }
    print({key: result[key] for key in list(result)[:1] + list(result)[4:9]}, flush=True)
    return result, curves


def main(arguments: list[str] | None = None) -> None:
    args = parsed(__doc__, "for the scan and its table", arguments)
    scan = scanned(args.folder, args.model)
    tokens = scan.load()
    mass, nucleus = table(args.folder, scan, tokens)
    hidden, results, drawn = tokens.hidden.float(), [], {}
    for min_p in MIN_PS:
        for name in (*LOSSES, "minimiser"):
            for seed in SEEDS:
                out = held_out(seed, tokens.document, HELD_OUT)
                data = Data(hidden, mass, tokens.gap, nucleus, out)
                result, curves = measured(name, data, min_p=min_p, seed=seed)
                results.append(result)
                if name in LOSSES and min_p == MIN_PS[-1]:
                    drawn.setdefault(name, curves)
    write(FOLDER / "v_curve.json", "v_curve", results, gravity=GRAVITY, tokens=len(tokens))
    png = v_curves(drawn, 1 - GRAVITY)
    atomic_write(FOLDER / "v_curve.png", lambda draft: draft.write_bytes(png))


if __name__ == "__main__":
    main()
