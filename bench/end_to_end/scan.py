"""Scanning and training from a scan, on the embedded model and the standard library's text:
seconds, tokens/s, bytes, memory.

    python -m bench.end_to_end.scan

The scan is compared with the bare forward of the base model with its LM head on the same batches;
the same epochs online with training from the scan, as every further head costs
(`over_scan_training`), and with the scan and training, as the first one does
(`over_scan_and_training`); the memory of training under `max_memory` with training that holds the
whole scan, each in a process of its own. Online training takes minutes on a CPU: it has fewer
rounds, each behind one of training from the scan.
"""

import json
import multiprocessing
import statistics
import tempfile
from dataclasses import dataclass, replace
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
from bench.clock import wall_seconds
from bench.machine import device
from bench.memory import peak_mb
from bench.records import Recording, options


@dataclass(frozen=True)
class Size:
    selected: int = 200_000  # tokens
    epochs: int = 5
    rounds: int = 5
    online_rounds: int = 3
    memory_limits: tuple[int, ...] = (0, 1_000_000, 20_000_000, 60_000_000)
    length: int = 512  # tokens of an example


TINY = Size(selected=500, epochs=1, rounds=1, online_rounds=1, memory_limits=(), length=64)


class Work:
    """The text, the base model, and what is timed."""

    def __init__(self, folder: Path, size: Size):
        self.folder, self.size = folder, size
        self.tokenizer = base_model.load_tokenizer(str(EMBEDDED_MODEL))
        dtype = base_model.frozen_dtype(device())
        self.base = base_model.load(str(EMBEDDED_MODEL), dtype, device())
        self.data = folder / "examples.jsonl"
        self._write_examples()
        self.config = ScanConfig(
            model=str(EMBEDDED_MODEL), data=str(self.data), output=folder / "scan0"
        )

    def _write_examples(self) -> None:
        """Slices of the text, enough for a scan that selects `size.selected` tokens."""
        seen, length = 0, self.size.length
        with self.data.open("w", encoding="utf-8") as file:
            for document in stream_examples("stdlib:head", ""):
                ids = self.tokenizer(document["text"]).input_ids
                for at in range(0, len(ids) - length, length):
                    one = ids[at : at + length]
                    file.write(json.dumps({"input_ids": one, "labels": [-100, *one[1:]]}) + "\n")
                    seen += length - 1
                    if seen > 1.33 * self.size.selected:
                        return

    @torch.inference_mode()
    def bare_forward(self) -> None:
        """The model with its LM head over the scan's batches."""
        lines, config = stream_examples(self.config.data, ""), self.config
        while block := list(islice(lines, config.examples_per_shard)):
            encoded = [
                (i, encode(self.tokenizer, line, config.max_length)) for i, line in enumerate(block)
            ]
            for batch in batches_by_length(encoded, config.batch_tokens):
                ids, mask, _ = (
                    t.to(self.base.weight.device) for t in pad([one for _, one in batch])
                )
                self.base.model(input_ids=ids, attention_mask=mask, use_cache=False)

    def scan(self, name: str) -> None:
        scan(replace(self.config, output=self.folder / name), self.base, self.tokenizer)

    def train_online(self, name: str) -> None:
        settings = TrainConfig(
            model="embedded",
            data=self.data,
            output=self.folder / name,
            num_train_epochs=self.size.epochs,
            max_length=self.size.length,
        )
        lines = stream_examples(self.config.data, "")
        encoded = [encode(self.tokenizer, line, self.size.length) for line in lines]
        train(OnlineSource(self.base, encoded, settings), settings)


def train_from(scan_folder: Path, output: Path, epochs: int, max_memory: int = 0) -> None:
    settings = TrainConfig(
        scan=scan_folder, output=output, num_train_epochs=epochs, max_memory=max_memory
    )
    train(ScanSource(Scan(scan_folder), settings, torch.device(device())), settings)


def _peak(connection, scan_folder: Path, output: Path, epochs: int, max_memory: int) -> None:
    settings = TrainConfig(
        scan=scan_folder, output=output.with_suffix(".warm"), max_steps=2, max_memory=1_000_000
    )
    # First the imports, and what the first step takes.
    train(ScanSource(Scan(scan_folder), settings, torch.device(device())), settings)
    connection.send(peak_mb(lambda: train_from(scan_folder, output, epochs, max_memory)))


def peak_mb_of_training(*arguments: object) -> float | None:
    """Peak memory of training in a fresh process above what it held before."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=(there, *arguments))
    process.start()
    there.close()
    grown = here.recv()
    process.join()
    return grown


def measure_scan(work: Work) -> tuple[list[dict], dict]:
    """The scan beside the bare forward; and facts that all results share."""
    folder, forward, scanning = work.folder, [], []
    work.bare_forward()  # warm
    for i in range(work.size.rounds):
        forward.append(wall_seconds(work.bare_forward))
        scanning.append(wall_seconds(lambda name=f"scan{i}": work.scan(name)))
    opened = Scan(folder / "scan0")
    seen = opened.manifest["counts"]["seen"]
    of_forward, of_scan = statistics.median(forward), statistics.median(scanning)
    results = [
        {
            "variant": "bare forward with LM head",
            "seconds": forward,
            "tokens_per_second": seen / of_forward,
        },
        {
            "variant": "scan",
            "seconds": scanning,
            "tokens_per_second": seen / of_scan,
            "speed_over_forward": of_forward / of_scan,
            "bytes_per_selected_token": sum(p.stat().st_size for p in opened.paths) / len(opened),
        },
    ]
    facts = {"tokens_seen": seen, "tokens_selected": len(opened), "H": opened.hidden_size}
    return results, facts


def measure_training(work: Work, of_scan: float) -> list[dict]:
    """Training from the scan beside the same epochs online, in turn."""
    folder, size = work.folder, work.size
    first, epochs = folder / "scan0", size.epochs
    train_from(first, folder / "warm", epochs)
    from_scan, online = [], []
    for i in range(size.rounds):
        output = folder / f"head{i}"
        from_scan.append(wall_seconds(lambda output=output: train_from(first, output, epochs)))
        if i < size.online_rounds:
            online.append(wall_seconds(lambda i=i: work.train_online(f"online{i}")))
    of_training, of_online = statistics.median(from_scan), statistics.median(online)
    return [
        {"variant": f"training from the scan, {epochs} epochs", "seconds": from_scan},
        {
            "variant": f"training online, {epochs} epochs",
            "seconds": online,
            "over_scan_training": of_online / of_training,
            "over_scan_and_training": of_online / (of_scan + of_training),
        },
    ]


def measure_memory(work: Work, limit: int) -> dict:
    """Training from the scan under one `max_memory`."""
    folder, epochs = work.folder, work.size.epochs
    peak = peak_mb_of_training(folder / "scan0", folder / f"memory{limit}", epochs, limit)
    name = f"training from the scan, max_memory {limit / 1e6:.0f} MB"
    return {"variant": name, "peak_mb": peak}


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    recording = Recording("scan", output=args.output)
    with tempfile.TemporaryDirectory() as name:
        work = Work(Path(name), TINY if args.tiny else Size())
        results, facts = measure_scan(work)
        facts["model"] = "embedded"
        recording.add(results, **facts)
        _, of_scan = (statistics.median(one["seconds"]) for one in results)
        recording.add(measure_training(work, of_scan), **facts)
        for limit in work.size.memory_limits:
            recording.add([measure_memory(work, limit)], **facts)


if __name__ == "__main__":
    main()
