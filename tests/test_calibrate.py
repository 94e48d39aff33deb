"""The conformal offset: its promise on synthetic scores and on the embedded model, what is
refused."""

import json
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import ScanSource
from autodeco_fast.training.calibrate import calibrate_from_files
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.conformal import calibrate, coverage, scores
from autodeco_fast.training.loop import train
from autodeco_fast.training.predictions import predict, required
from autodeco_fast.training.scan import scan
from autodeco_fast.training.scan_store import Scan
from tests.scans import EVERY, make_scan

LIMIT = 2.0
ALPHAS = (0.02, 0.05, 0.1, 0.2)
MIN_P = 1e-3  # at 0.1, 22 % of the held-out tokens need more than T = 2 of the small model


def documents(n: int, generator, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Required, predicted, document: tokens of a document share a shift; some are greedy, few out
    of reach."""
    length = 40
    shift = generator.normal(0, spread, n).repeat(length)
    need = np.clip(generator.gamma(1.0, 0.35, n * length) + shift, 0, None)
    predicted = np.clip(0.5 * need + generator.uniform(0, 0.5, n * length), 0, LIMIT)
    return need, predicted, np.arange(n).repeat(length)


def test_the_quantile_is_the_one_of_the_definition():
    s = np.array([0.5, -0.25, np.inf, 0.125, -np.inf, 0.25, 0.0, 1.0, -0.5])  # n = 9
    for alpha, place in ((0.5, 5), (0.3, 7), (0.2, 8), (0.75, 3)):  # ⌈10·(1 − α)⌉
        want = np.sort(s)[place - 1]
        assert calibrate(s, np.arange(9), alpha, LIMIT, draws=2).offset == np.clip(
            want, -LIMIT, LIMIT
        )
    with pytest.raises(
        ValueError, match=r"alpha 0\.1 is out of reach: 11\.1% of the 9 tokens .* at least 0\.2000"
    ):
        calibrate(s, np.arange(9), 0.1, LIMIT)


def test_covered_is_what_the_score_says():
    need, predicted, _ = documents(50, np.random.default_rng(0))
    s = scores(need, predicted, LIMIT)
    for q in (-3.0, -0.4, 0.0, 0.3, 3.0):
        assert coverage(need, predicted, q, LIMIT) == (s <= q).mean()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_promise_holds_on_average(alpha):
    """Over many draws of documents, coverage of new ones is 1 − α or more, and not much more."""
    found = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        need, predicted, document = documents(40, generator, spread=0.05)
        result = calibrate(scores(need, predicted, LIMIT), document, alpha, LIMIT, draws=2)
        need, predicted, _ = documents(200, generator, spread=0.05)
        found.append(coverage(need, predicted, result.offset, LIMIT))
    error = np.std(found) / len(found) ** 0.5
    assert 1 - alpha - 4 * error <= np.mean(found) <= 1 - alpha + 0.01 + 4 * error


def test_the_interval_covers_new_documents():
    """Documents differ here: an interval over tokens would be far too narrow."""
    inside = []
    for seed in range(60):
        generator = np.random.default_rng(1000 + seed)
        need, predicted, document = documents(60, generator)
        low, high = calibrate(
            scores(need, predicted, LIMIT), document, 0.1, LIMIT, draws=300
        ).coverage
        need, predicted, _ = documents(60, generator)
        s = scores(need, predicted, LIMIT)
        offset = calibrate(
            scores(*documents(60, np.random.default_rng(1000 + seed))[:2], LIMIT),
            document,
            0.1,
            LIMIT,
            draws=2,
        )
        inside.append(low <= (s <= offset.offset).mean() <= high)
    assert np.mean(inside) >= 0.85


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A head trained on a scan, and all-token scans of held-out code and of text read backwards."""
    folder = tmp_path_factory.mktemp("embedded")
    base = base_model.load(str(EMBEDDED_MODEL), torch.bfloat16)
    tokenizer = base_model.load_tokenizer(str(EMBEDDED_MODEL))
    backwards = folder / "backwards.jsonl"
    text = "\n".join(
        topics[name] for name in sorted(topics)
    )  # the language reference, backwards: a domain of its own
    pieces = [text[at : at + 1500][::-1] for at in range(0, 60_000, 1500)]
    backwards.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    common = {"model": str(EMBEDDED_MODEL), "max_length": 256}
    for name, data, options in (
        ("train", "stdlib:head", {}),
        ("held-out", "stdlib:held_out", EVERY),
        ("backwards", str(backwards), EVERY),
    ):
        scan(ScanConfig(data=data, output=folder / name, **common, **options), base, tokenizer)
    settings = TrainConfig(
        scan=folder / "train", output=folder / "head", num_train_epochs=4, min_p=MIN_P
    )
    train(ScanSource(Scan(folder / "train"), settings, torch.device("cpu")), settings)
    return folder


def test_held_out_coverage_lies_within_the_interval(embedded):
    head, tokens = (
        TemperatureHead.from_pretrained(embedded / "head"),
        Scan(embedded / "held-out").load(),
    )
    T, need, document = predict(head, tokens), required(tokens, MIN_P), tokens.document.numpy()
    half = np.isin(document, np.unique(document)[::2])
    assert len(np.unique(document)) > 40
    for alpha in ALPHAS:
        result = calibrate(scores(need, T, LIMIT)[half], document[half], alpha, LIMIT)
        low, high = result.coverage
        assert low <= coverage(need[~half], T[~half], result.offset, LIMIT) <= high
        assert low <= 1 - alpha <= high


def test_calibrates_a_folder_and_says_how_far_it_misses(embedded, capsys):
    calibrate_from_files(
        embedded / "head", embedded / "held-out", 0.05, None, [embedded / "backwards"]
    )
    said = capsys.readouterr().err
    record = json.loads((embedded / "head/calibration.json").read_text())
    head = TemperatureHead.from_pretrained(embedded / "head")
    assert head.offset == record["offset"] != 0
    tokens = Scan(embedded / "held-out").load()
    with torch.inference_mode():
        T = head(tokens.hidden.float()).numpy()
    assert (required(tokens, MIN_P) <= T).mean() == pytest.approx(0.95, abs=0.002)
    (there,) = record["checks"].values()
    assert f"{100 * (there - 0.95):+.1f} points from the promise" in " ".join(said.split())
    assert abs(there - 0.95) > 0.01  # another domain: nothing is promised, and it shows
    calibrate_from_files(
        embedded / "head", embedded / "held-out", 0.05, None, []
    )  # the old offset does not count
    assert TemperatureHead.from_pretrained(embedded / "head").offset == head.offset


def test_what_does_not_fit_is_refused(tmp_path):
    scan_folder, filtered = make_scan(tmp_path), make_scan(tmp_path, "filtered", all_tokens=False)
    folder = tmp_path / "head"
    TemperatureHead(32).save_pretrained(folder)
    TemperatureHead(8).save_pretrained(tmp_path / "narrow")

    def run(head=folder, scan=scan_folder, alpha=0.4, min_p=None):
        calibrate_from_files(head, scan, alpha, min_p, [])

    before = (folder / "autodeco_config.json").read_bytes()
    for call, words in (
        (lambda: run(head=tmp_path / "narrow"), "head has width 8, scan .* was made of width 32"),
        (
            lambda: run(scan=filtered),
            "left tokens out by difficulty: scan held-out text with --all-tokens",
        ),
        (lambda: run(alpha=1.5), r"alpha must be in \(0, 1\), got 1.5"),
        (lambda: run(alpha=1e-6), "alpha 1e-06 is out of reach: .* alpha must be at least"),
        (lambda: run(min_p=2.0), r"min_p must be in \(0, 1\), got 2.0"),
        (lambda: run(scan=tmp_path), "scan must be a folder with scan.json"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    (folder / "training.json").write_text(json.dumps({"lm_head": "other"}))
    with pytest.raises(ValueError, match="is of another lm_head than the head"):
        run()
    assert (folder / "autodeco_config.json").read_bytes() == before
