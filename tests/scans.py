"""Small scans of a tiny model and of the embedded one, for tests of what reads them."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import ScanSource
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.loop import train
from autodeco_fast.training.scan import scan
from autodeco_fast.training.scan_store import Scan
from tests.processes import Member, together
from tests.tiny_models import VOCAB, tiny_model


class Vocabulary:
    """As much of a tokenizer as examples of ids need."""

    def __init__(self, extra: str = ""):
        self.extra = extra

    def get_vocab(self) -> dict[str, int]:
        return {f"{self.extra}{i}": i for i in range(VOCAB)}


def write_examples(path: Path, n: int = 30, seed: int = 0, length: int = 14) -> Path:
    """JSONL of random ids, examples of unequal length."""
    g = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for i in range(n):
            ids = torch.randint(3, VOCAB, (length - i % 7,), generator=g).tolist()
            file.write(json.dumps({"input_ids": ids, "labels": [-100, *ids[1:]]}) + "\n")
    return path


EVERY = {"all_tokens": True}


def files(folder: Path) -> dict[str, bytes]:
    """Name → bytes of each."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_scan(
    tmp_path: Path, name: str = "scan", base=None, tokenizer=None, accelerator=None, **options
) -> Path:
    """Scans, or continues; the folder, or the URL that is the option `output`."""
    output = options.pop("output", tmp_path / name)
    data = options.pop("data", None) or write_examples(tmp_path / "examples.jsonl")
    model = options.pop("model", "tiny")
    settings = {"examples_per_shard": 4, "batch_tokens": 40, **EVERY, **options}
    config = ScanConfig(model=model, data=str(data), output=output, **settings)
    base = base or base_model.wrap(tiny_model("llama"))
    scan(config, base, tokenizer or Vocabulary(), accelerator=accelerator)
    return config.output


def scan_together(folder: Path, name: str, world: int, **options) -> list:
    data = folder / "examples.jsonl"
    if not data.exists():
        write_examples(data)
    base = base_model.wrap(tiny_model("llama"))

    def work(accelerator: Member):
        return make_scan(folder, name, base, accelerator=accelerator, data=data, **options)

    return together(world, work)


# At 0.1, 25 % of the held-out tokens need more than T = 2 of the small model.
EMBEDDED_MIN_P = 1e-3


def link_embedded(folder: Path) -> Path:
    """Scans of the embedded model, to be read, and a head of one's own: `_embedded`."""
    made = Path(_embedded().name)
    shutil.copytree(made / "head", folder / "head")
    for name in ("held-out", "backwards"):
        (folder / name).symlink_to(made / name)
    return folder


@functools.lru_cache
def _embedded() -> tempfile.TemporaryDirectory:
    """A head trained on a scan; scans of every token of held-out code and text read backwards."""
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    name, cpu = str(EMBEDDED_MODEL), torch.device("cpu")
    base = base_model.load(name, base_model.frozen_dtype(cpu))
    tokenizer = base_model.load_tokenizer(name)
    backwards = folder / "backwards.jsonl"
    # The language reference, backwards: a domain of its own.
    text = "\n".join(topics[name] for name in sorted(topics))
    reversed_texts = [text[at : at + 1500][::-1] for at in range(0, 18_000, 1500)]
    backwards.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed_texts))
    for data, output, options in (
        ("stdlib:head", "train", {}),
        ("stdlib:held_out", "held-out", EVERY),
        (str(backwards), "backwards", EVERY),
    ):
        options = {"model": name, "max_length": 128, **options}
        scan(ScanConfig(data=data, output=folder / output, **options), base, tokenizer)
    settings = TrainConfig(
        scan=folder / "train", output=folder / "head", num_train_epochs=4, min_p=EMBEDDED_MIN_P
    )
    train(ScanSource(Scan(folder / "train"), settings, cpu), settings)
    return made
