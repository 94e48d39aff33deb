"""Scanning and training from a scan, on the embedded model and the standard library's text:
seconds, tokens/s, bytes, memory.

    python -m bench.end_to_end.scan

The scan is compared with the bare forward of the base model with its LM head on the same batches;
training from the scan with the same epochs online; the memory of training under `max_memory` with
training that holds the whole scan, each in a process of its own.
"""

import json
import multiprocessing
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import OnlineSource, ScanSource
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.data import encode, stream_examples
from autodeco_fast.training.loop import train
from autodeco_fast.training.scan import batches_by_length, pad, scan
from autodeco_fast.training.scan_store import Scan
from bench.machine import device
from bench.memory import peak_bytes
from bench.records import record

KEPT, EPOCHS, ROUNDS = 200_000, 5, 5


def prepare(folder: Path) -> tuple[ScanConfig, object, object]:
    """Pieces of the text as JSONL, enough for a scan of `KEPT` tokens."""
    tokenizer = base_model.load_tokenizer(str(EMBEDDED_MODEL))
    base = base_model.load(str(EMBEDDED_MODEL), base_model.frozen_dtype(device()), device())
    data, seen = folder / "rows.jsonl", 0
    with data.open("w", encoding="utf-8") as file:
        for row in stream_examples("stdlib:head", ""):
            ids = tokenizer(row["text"]).input_ids
            for at in range(0, len(ids) - 512, 512):
                piece = ids[at : at + 512]
                file.write(json.dumps({"input_ids": piece, "labels": [-100, *piece[1:]]}) + "\n")
                seen += 511
            if seen > 1.33 * KEPT:
                break
    return (
        ScanConfig(model=str(EMBEDDED_MODEL), data=str(data), output=folder / "scan"),
        base,
        tokenizer,
    )


@torch.inference_mode()
def bare_forward(config: ScanConfig, base, tokenizer) -> int:
    """The model with its LM head over the scan's batches; targets seen."""
    seen, rows = 0, stream_examples(config.data, "")
    while block := list(islice(rows, config.rows_per_shard)):
        encoded = [(i, encode(tokenizer, row, config.max_length)) for i, row in enumerate(block)]
        for batch in batches_by_length(encoded, config.batch_tokens):
            ids, mask, labels = (t.to(base.weight.device) for t in pad([row for _, row in batch]))
            base.model(input_ids=ids, attention_mask=mask, use_cache=False)
            seen += int((labels[:, 1:] != -100).sum())
    return seen


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def train_from(scan_folder: Path, output: Path, max_memory: int = 0) -> None:
    settings = TrainConfig(
        scan=scan_folder, output=output, num_train_epochs=EPOCHS, max_memory=max_memory
    )
    train(ScanSource(Scan(scan_folder), settings, torch.device(device())), settings)


def _peak(connection, scan_folder: Path, output: Path, max_memory: int) -> None:
    settings = TrainConfig(
        scan=scan_folder, output=output.with_suffix(".warm"), max_steps=2, max_memory=1_000_000
    )
    train(
        ScanSource(Scan(scan_folder), settings, torch.device(device())), settings
    )  # imports, and what the first step takes
    connection.send(peak_bytes(lambda: train_from(scan_folder, output, max_memory)))


def peak_bytes_of_training(*arguments) -> int:
    """Peak memory of training in a fresh process above what it held before."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=(there, *arguments))
    process.start()
    grown = here.recv()
    process.join()
    return grown


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, base, tokenizer = prepare(folder)
        forward, scanning = [], []
        bare_forward(config, base, tokenizer)  # warm
        for i in range(ROUNDS):
            forward.append(seconds(lambda: bare_forward(config, base, tokenizer)))
            one = replace(config, output=folder / f"scan{i}")
            scanning.append(seconds(lambda one=one: scan(one, base, tokenizer)))
        opened = Scan(folder / "scan0")
        seen, median = (
            opened.manifest["counts"]["seen"],
            lambda values: sorted(values)[len(values) // 2],
        )
        rows = [
            {
                "work": "bare forward with LM head",
                "seconds": median(forward),
                "tokens_per_second": seen / median(forward),
            },
            {
                "work": "scan",
                "seconds": median(scanning),
                "tokens_per_second": seen / median(scanning),
                "speed_over_forward": median(forward) / median(scanning),
                "bytes_per_kept_token": sum(p.stat().st_size for p in opened.paths) / len(opened),
            },
        ]
        times = [
            seconds(lambda i=i: train_from(folder / "scan0", folder / f"head{i}"))
            for i in range(ROUNDS)
        ]
        rows.append({"work": f"training from the scan, {EPOCHS} epochs", "seconds": median(times)})
        settings = TrainConfig(
            model="embedded",
            data=Path(config.data),
            output=folder / "online",
            num_train_epochs=EPOCHS,
            max_length=512,
        )
        encoded = [encode(tokenizer, row, 512) for row in stream_examples(config.data, "")]
        online = seconds(lambda: train(OnlineSource(base, encoded, settings), settings))
        rows.append(
            {
                "work": f"training online, {EPOCHS} epochs",
                "seconds": online,
                "over_scan_training": online / median(times),
            }
        )
        for limit in (0, 1_000_000, 20_000_000, 60_000_000):
            grown = peak_bytes_of_training(folder / "scan0", folder / f"memory{limit}", limit)
            rows.append(
                {
                    "work": f"training from the scan, max_memory {limit / 1e6:.0f} MB",
                    "peak_mb": grown / 1e6,
                }
            )
        facts = {
            "tokens_seen": seen,
            "tokens_kept": len(opened),
            "hidden_size": opened.hidden_size,
            "rounds": ROUNDS,
        }
        record("scan", rows, model="embedded", **facts)


if __name__ == "__main__":
    main()
