"""Small scans of a tiny model, for tests of what reads them."""

import json
from pathlib import Path

import torch

from autodeco_fast.training import base_model
from autodeco_fast.training.config import ScanConfig
from autodeco_fast.training.scan import scan
from tests.tiny_models import VOCAB, tiny_model


class Vocabulary:
    """As much of a tokenizer as rows of ids need."""

    def __init__(self, extra: str = ""):
        self.extra = extra

    def get_vocab(self) -> dict[str, int]:
        return {f"{self.extra}{i}": i for i in range(VOCAB)}


def write_rows(path: Path, n: int = 30, seed: int = 0, length: int = 14) -> Path:
    """JSONL of random ids, rows of unequal length."""
    g = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for i in range(n):
            ids = torch.randint(3, VOCAB, (length - i % 7,), generator=g).tolist()
            file.write(json.dumps({"input_ids": ids, "labels": [-100, *ids[1:]]}) + "\n")
    return path


EVERY = {"all_tokens": True}


def make_scan(tmp_path: Path, name: str = "scan", base=None, tokenizer=None, **options) -> Path:
    """Scans, or continues; the folder."""
    data = options.pop("data", None) or write_rows(tmp_path / "rows.jsonl")
    model = options.pop("model", "tiny")
    settings = {"rows_per_shard": 4, "batch_tokens": 40, **EVERY, **options}
    config = ScanConfig(model=model, data=str(data), output=tmp_path / name, **settings)
    scan(config, base or base_model.wrap(tiny_model("llama")), tokenizer or Vocabulary())
    return config.output
