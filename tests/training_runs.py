"""Small training runs of a tiny model, from examples and from a scan."""

import json
from pathlib import Path

import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import OnlineSource, ScanSource
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.data import Example
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.loop import train
from autodeco_fast.training.scan_store import Scan
from tests.scans import make_scan
from tests.tiny_models import VOCAB, tiny_model

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# A run that is worth resuming.
LONG = {
    "num_train_epochs": 3,
    "save_steps": 2,
    "easy_fraction": 0.5,
    "trivial_prob": 0.0,
    "eval_fraction": 0.2,
    "eval_steps": 3,
}


def make_examples(n: int, length: int = 12) -> list[Example]:
    """Random ids of unequal length; the first two are no targets."""
    g = torch.Generator().manual_seed(n)
    made = []
    for i in range(n):
        ids = torch.randint(3, VOCAB, (length - i % 5,), generator=g).tolist()
        made.append(Example(ids, [-100, -100, *ids[2:]]))
    return made


def online_config(tmp_path: Path, name: str = "out", **options) -> TrainConfig:
    """Of a run on all tokens of some examples."""
    options = {"max_rank": VOCAB, "easy_fraction": 1.0, **options}
    return TrainConfig(model="", data=tmp_path / "no", output=tmp_path / name, **options)


def train_online(
    tmp_path: Path, name: str = "out", examples: list[Example] | None = None, **options
) -> tuple[TemperatureHead, list[dict]]:
    """The head and its metrics."""
    settings = online_config(tmp_path, name, **options)
    base = base_model.wrap(tiny_model("llama"))
    learn, measure_on = OnlineSource(base, examples or make_examples(16), settings).split()
    head = train(learn, settings, measure_on=measure_on)
    return head, read_lines(settings.output / METRICS_NAME)


def scan_config(tmp_path: Path, name: str = "out", **options) -> TrainConfig:
    """Of a run on all tokens of `tmp_path / "scan"`."""
    options = {"batch_tokens": 50, "max_rank": 2**31 - 1, "easy_fraction": 1.0, **options}
    return TrainConfig(**{"scan": tmp_path / "scan", "output": tmp_path / name, **options})


def source_of(settings: TrainConfig) -> ScanSource:
    return ScanSource(Scan(settings.scan), settings, CPU)


def train_from_scan(
    tmp_path: Path, name: str = "out", on_step=None, **options
) -> tuple[TemperatureHead, list[dict]]:
    """Makes the scan if there is none, trains; the head and its metrics."""
    if not (tmp_path / "scan/scan.json").exists():
        make_scan(tmp_path)
    settings = scan_config(tmp_path, name, **options)
    source, measure_on = source_of(settings).split()
    watched = {} if on_step is None else {"on_step": on_step}
    head = train(source, settings, measure_on=measure_on, **watched)
    return head, read_lines(settings.output / METRICS_NAME)


def read_lines(path: Path) -> list[dict]:
    """Lines of JSON without their times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
