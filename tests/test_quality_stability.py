"""The study of learning rates, on runs that are written out by hand."""

import json

import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training.config import OBJECTIVES
from bench.quality import stability


def write_run(work, rate: float, seed: int, *path: float, T: float = 1.0) -> None:
    """A finished run with these held-out losses, whose head says T everywhere."""
    config = stability.config_of(work, "hinge", rate, seed)
    head = TemperatureHead(8)
    torch.nn.init.constant_(head.mlp[2].bias, torch.tensor(T / 2).logit().item())
    config.output.mkdir(parents=True)
    head.save_pretrained(config.output)
    lines = [{"step": 4 * i, "eval_loss": loss} for i, loss in enumerate(path, 1)]
    lines.insert(0, {"step": 1})  # of a step that was not measured
    (config.output / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_every_variant_is_one_that_train_takes(tmp_path):
    folders = {
        stability.config_of(tmp_path, variant, rate, seed).output
        for variant in stability.VARIANTS
        for rate in stability.RATES
        for seed in stability.SEEDS
    }
    assert len(folders) == len(stability.VARIANTS) * len(stability.RATES) * len(stability.SEEDS)
    tried = {options["objective"] for options in stability.VARIANTS.values()}
    assert tried == set(OBJECTIVES) - {"rewards", "autodeco_top_p", "autodeco_joint"}


def test_what_was_lost_is_of_what_there_was_to_gain(tmp_path, monkeypatch):
    monkeypatch.setattr(stability, "SEEDS", (0, 1))
    monkeypatch.setattr(stability, "RATES", (1e-3, 1e-1))
    for seed in (0, 1):
        write_run(tmp_path, stability.NEW, seed, 3.0)
        write_run(tmp_path, 1e-3, seed, 2.0, 1.15, 1.0, T=0.5 + 0.4 * seed)
        write_run(tmp_path, 1e-1, seed, 4.0, 5.0 if seed else 2.0)
    slow, fast = stability.results_of(tmp_path, "hinge", torch.zeros(5, 8))
    assert slow["lost"] == [0.0, 0.0]
    assert slow["steps_to_arrive"] == [8, 8]  # within a tenth of the way from 3 to 1
    assert slow["mean_T"] == pytest.approx([0.5, 0.9])
    assert slow["seeds_apart"] == pytest.approx(0.4)
    assert fast["lost"] == [0.5, 2.0]  # the second is worse than a new head
    assert fast["steps_to_arrive"] == [None, None]
    assert fast["seeds_apart"] == pytest.approx(0.0)
    stability.draw(tmp_path / "figure.png", [slow, fast])
    assert (tmp_path / "figure.png").stat().st_size > 10_000
