"""What a head learns from selected tokens: the conditional quantile over all reachable ones."""

import math

import pytest
import torch

from autodeco_fast import TokenStats, goldilocks_mask, goldilocks_weight
from autodeco_fast.training.batches import OnlineSource, ScanSource
from autodeco_fast.training.config import ScanConfig
from autodeco_fast.training.head_folder import METRICS_NAME
from autodeco_fast.training.loop import objective_of, train, with_min_p
from autodeco_fast.training.scan import scan_batch
from autodeco_fast.training.scan_store import (
    COUNTS,
    FORMAT,
    Scan,
    shard_path,
    write_manifest,
    write_shard,
)
from tests.laws import LAW, Law, examples, settings
from tests.training_runs import CPU, read_lines

WITHOUT_WEIGHTS = [1.2, 0.9, 0.8, 0.5]  # of the same atoms, with a tenth of the trivial ones


def temperatures(head) -> torch.Tensor:
    with torch.no_grad():
        return head(torch.eye(len(LAW)))


def assert_learned(head, quantiles: list[float]) -> None:
    """Atoms are at least 0.3 apart."""
    assert (temperatures(head) - torch.tensor(quantiles)).abs().max() < 0.12, temperatures(head)


def make_scan(tmp_path, easy_fraction: float, all_tokens: bool = False) -> Scan:
    """A scan of the law's tokens with this selection."""
    config = ScanConfig(
        model="",
        data="",
        output=tmp_path / "scan",
        easy_fraction=easy_fraction,
        all_tokens=all_tokens,
    )
    counts = dict.fromkeys(COUNTS, 0)
    tokens = scan_batch(Law(), list(enumerate(examples())), config, share=1.0, counts=counts)
    config.output.mkdir()
    write_shard(shard_path(config.output, 0), tokens, counts, share=1.0)
    names = ("model", "all_tokens", "seed", "easy_fraction", "trivial_prob")
    manifest = {
        **{"format": FORMAT, "hidden_size": len(LAW), "lm_head": "", "tokenizer": "", "data": ""},
        "settings": {name: getattr(config, name) for name in names},
        **{"share": 1.0, "shards": 1, "tokens": len(tokens), "counts": counts},
    }
    write_manifest(config.output, manifest)
    return Scan(config.output)


@pytest.mark.parametrize("easy_fraction", [1.0, 0.3, 0.1])
def test_the_quantile_is_learned_online(tmp_path, easy_fraction):
    config = settings(tmp_path, easy_fraction=easy_fraction)
    head = train(OnlineSource(Law(), examples(), config), config)
    assert_learned(head, [quantile for _, quantile in LAW])


def test_without_weights_it_is_not(tmp_path):
    """The twin: errors count ten times where the model is sure."""
    config = settings(tmp_path, easy_weight="none")
    head = train(OnlineSource(Law(), examples(), config), config)
    assert_learned(head, WITHOUT_WEIGHTS)
    with pytest.raises(AssertionError):
        assert_learned(head, [quantile for _, quantile in LAW])


@pytest.mark.parametrize(
    ("scanned", "all_tokens", "trained"),
    [(0.1, False, 1.0), (0.3, False, 0.1), (0.1, False, 0.3), (1.0, True, 0.1)],
)
def test_the_quantile_is_learned_from_a_scan(tmp_path, scanned, all_tokens, trained):
    """What counts is the chance to come through both selections, which is that of the narrower."""
    scan = make_scan(tmp_path, scanned, all_tokens)
    config = settings(tmp_path, scan=scan.folder, easy_fraction=trained)
    source = ScanSource(scan, config, CPU)
    head = train(source, config)
    assert_learned(head, [quantile for _, quantile in LAW])
    (batch,) = source.batches(0, 0, 0, 1)
    found = objective_of(with_min_p(config))(batch, None, head).weight.sum().item()
    assert found == pytest.approx(385 * 3, rel=0.2)  # of those within reach
    if all_tokens:
        assert batch.weight.unique().tolist() == [1.0]


def test_metrics_speak_for_all_tokens(tmp_path):
    """The share of targets with T* = 0, of reachable ones: selected tokens alone would say half."""
    config = settings(tmp_path, num_train_epochs=1, gravity=0.99, learning_rate=1e-30)
    train(OnlineSource(Law(), examples(), config), config)
    (seen,) = read_lines(config.output / METRICS_NAME)
    required = [(T, n) for atoms, _ in LAW for T, n in atoms.items() if T <= 2]
    total = sum(n for _, n in required)
    mean = sum(T * n for T, n in required) / total
    assert seen["required_temperature"] == pytest.approx(mean, rel=0.2)
    assert seen["selected_tokens"] < 0.5 * total * 3
    config = settings(tmp_path, num_train_epochs=1, easy_weight="none", output=tmp_path / "biased")
    train(OnlineSource(Law(), examples(), config), config)
    (biased,) = read_lines(config.output / METRICS_NAME)
    assert biased["required_temperature"] > 1.5 * mean


def test_weights_of_a_selection():
    rank = torch.tensor([-1, 0, 0, 5, 200])
    log_p = torch.tensor([0.0, -0.01, -2.0, -3.0, -9.0])
    zero = torch.zeros(5)
    stats = TokenStats(zero, rank, log_p, zero, rank, zero)
    for fraction, weight in ((0.25, 4.0), (1.0, 1.0)):
        uniform = torch.zeros(5)
        found = goldilocks_weight(stats, easy_fraction=fraction, uniform=uniform)
        assert found.tolist() == [0.0, weight, 1.0, 1.0, 0.0]
    biased = goldilocks_weight(stats, easy_weight="none", uniform=uniform)
    assert biased.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert torch.equal(biased > 0, goldilocks_mask(stats, uniform=uniform))
    rare = goldilocks_weight(stats, easy_fraction=1e-300, uniform=uniform)
    assert rare.isfinite().all()
    with pytest.raises(ValueError, match="easy_weight must be one of 'inverse', 'none', got 'x'"):
        goldilocks_weight(stats, easy_weight="x")


def test_selected_tokens_speak_for_all():
    """Σ weight over the selected trivial tokens is about their number."""
    n = 20_000
    rank, zero = torch.zeros(n, dtype=torch.long), torch.zeros(n)
    stats = TokenStats(zero, rank, zero, zero, rank, zero)
    generator = torch.Generator().manual_seed(0)
    weight = goldilocks_weight(stats, easy_fraction=0.1, generator=generator)
    deviation = math.sqrt(n * 0.1 * 0.9) / 0.1
    assert abs(weight.sum().item() - n) < 4 * deviation
