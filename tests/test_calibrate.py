"""The conformal offset: its promise on synthetic scores and on the embedded model, what is
refused."""

import json

import numpy as np
import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training.calibrate import calibrate_from_files
from autodeco_fast.training.conformal import Offset, calibrate, coverage, scores
from autodeco_fast.training.predictions import predict, required_temperatures
from autodeco_fast.training.scan_store import Scan
from tests.scans import EMBEDDED_MIN_P, link_embedded, make_scan

LIMIT = 2.0
ALPHAS = (0.02, 0.05, 0.1, 0.2)


def documents(n: int, generator, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Required, predicted, document: tokens of a document share a shift; some are greedy, few out
    of reach."""
    length = 40
    shift = generator.normal(0, spread, n).repeat(length)
    required = np.clip(generator.gamma(1.0, 0.35, n * length) + shift, 0, None)
    predicted = np.clip(0.5 * required + generator.uniform(0, 0.5, n * length), 0, LIMIT)
    return required, predicted, np.arange(n).repeat(length)


def offset_of(s: np.ndarray, document: np.ndarray, alpha: float, **options) -> Offset:
    return calibrate(s, document, alpha=alpha, max_temperature=LIMIT, **options)


def test_the_quantile_is_the_one_of_the_definition():
    s = np.array([0.5, -0.25, np.inf, 0.125, -np.inf, 0.25, 0.0, 1.0, -0.5])  # n = 9
    for alpha, place in ((0.5, 5), (0.3, 7), (0.2, 8), (0.75, 3)):  # ⌈10·(1 − α)⌉
        want = np.sort(s)[place - 1]
        assert offset_of(s, np.arange(9), alpha, samples=2).offset == np.clip(want, -LIMIT, LIMIT)
    with pytest.raises(
        ValueError, match=r"alpha 0\.1 is out of reach: 11\.1% of the 9 tokens .* at least 0\.2000"
    ):
        offset_of(s, np.arange(9), 0.1)


@pytest.mark.parametrize(("tokens", "unreachable"), [(80, 0), (81, 2), (9, 2), (999, 123), (6, 1)])
def test_the_alpha_that_a_refusal_names_is_accepted(tokens, unreachable):
    s = np.r_[np.zeros(tokens - unreachable), np.full(unreachable, np.inf)]
    with pytest.raises(ValueError, match=r"alpha must be at least") as refused:
        offset_of(s, np.arange(tokens), 1e-4)
    least = str(refused.value).rpartition(" ")[2]
    assert offset_of(s, np.arange(tokens), float(least), samples=2).offset == 0.0
    with pytest.raises(ValueError, match=f"at least {least}"):
        offset_of(s, np.arange(tokens), float(least) - 1e-4)


def test_covered_is_what_the_score_says():
    required, predicted, _ = documents(50, np.random.default_rng(0))
    s = scores(required, predicted, LIMIT)
    for q in (-3.0, -0.4, 0.0, 0.3, 3.0):
        assert coverage(required, predicted, offset=q, max_temperature=LIMIT) == (s <= q).mean()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_promise_holds_on_average(alpha):
    """Over many samples of documents, coverage of new ones is 1 − α or more, and not much more."""
    found = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        required, predicted, document = documents(40, generator, spread=0.05)
        result = offset_of(scores(required, predicted, LIMIT), document, alpha, samples=2)
        required, predicted, _ = documents(200, generator, spread=0.05)
        found.append(coverage(required, predicted, offset=result.offset, max_temperature=LIMIT))
    error = np.std(found) / len(found) ** 0.5
    assert 1 - alpha - 4 * error <= np.mean(found) <= 1 - alpha + 0.01 + 4 * error


def test_the_interval_covers_new_documents():
    """Documents differ here: an interval over tokens would be far too narrow."""
    inside = []
    for seed in range(60):
        generator = np.random.default_rng(1000 + seed)
        required, predicted, document = documents(60, generator)
        low, high = offset_of(
            scores(required, predicted, LIMIT), document, 0.1, samples=300
        ).coverage
        required, predicted, _ = documents(60, generator)
        s = scores(required, predicted, LIMIT)
        first = scores(*documents(60, np.random.default_rng(1000 + seed))[:2], LIMIT)
        offset = offset_of(first, document, 0.1, samples=2)
        inside.append(low <= (s <= offset.offset).mean() <= high)
    assert np.mean(inside) >= 0.85


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    return link_embedded(tmp_path_factory.mktemp("embedded"))


@pytest.mark.slow
def test_held_out_coverage_lies_within_the_interval(embedded):
    head = TemperatureHead.from_pretrained(embedded / "head")
    tokens = Scan(embedded / "held-out").load()
    T, required = predict(head, tokens), required_temperatures(tokens, EMBEDDED_MIN_P)
    document = tokens.document.numpy()
    half = np.isin(document, np.unique(document)[::2])
    assert len(np.unique(document)) >= 40
    for alpha in ALPHAS:
        result = offset_of(scores(required, T, LIMIT)[half], document[half], alpha)
        low, high = result.coverage
        assert (
            low
            <= coverage(required[~half], T[~half], offset=result.offset, max_temperature=LIMIT)
            <= high
        )
        assert low <= 1 - alpha <= high


@pytest.mark.slow
def test_calibrates_a_folder_and_says_how_far_it_misses(embedded, capsys):
    head_folder, scan = embedded / "head", embedded / "held-out"
    calibrate_from_files(head_folder, scan, alpha=0.05, checks=[embedded / "backwards"])
    said = capsys.readouterr().err
    record = json.loads((embedded / "head/calibration.json").read_text())
    head = TemperatureHead.from_pretrained(embedded / "head")
    assert head.offset == record["offset"] != 0
    tokens = Scan(embedded / "held-out").load()
    with torch.inference_mode():
        T = head(tokens.hidden.float()).numpy()
    assert (required_temperatures(tokens, EMBEDDED_MIN_P) <= T).mean() == pytest.approx(
        0.95, abs=0.002
    )
    (there,) = record["checks"].values()
    assert f"{100 * (there - 0.95):+.1f} points from the promise" in " ".join(said.split())
    assert abs(there - 0.95) > 0.01  # another domain: nothing is promised, and it shows
    calibrate_from_files(head_folder, scan, alpha=0.05)  # the old offset does not count
    assert TemperatureHead.from_pretrained(embedded / "head").offset == head.offset


def test_what_does_not_fit_is_refused(tmp_path):
    scan_folder, filtered = make_scan(tmp_path), make_scan(tmp_path, "filtered", all_tokens=False)
    folder = tmp_path / "head"
    TemperatureHead(32).save_pretrained(folder)
    TemperatureHead(8).save_pretrained(tmp_path / "narrow")

    def run(head=folder, scan=scan_folder, alpha=0.4, min_p=None):
        calibrate_from_files(head, scan, alpha=alpha, min_p=min_p)

    before = (folder / "autodeco_config.json").read_bytes()
    for options, words in (
        ({"head": tmp_path / "narrow"}, "head has width 8, scan .* was made of width 32"),
        (
            {"scan": filtered},
            "left tokens out by difficulty: scan held-out text with --all-tokens",
        ),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\), got 1.5"),
        ({"alpha": 1e-6}, "alpha 1e-06 is out of reach: .* alpha must be at least"),
        ({"min_p": 2.0}, r"min_p must be in \(0, 1\), got 2.0"),
        ({"scan": tmp_path}, "scan must be a folder with scan.json"),
    ):
        with pytest.raises(ValueError, match=words):
            run(**options)
    (folder / "training.json").write_text(json.dumps({"lm_head": "other"}))
    with pytest.raises(ValueError, match="is of another lm_head than the head"):
        run()
    assert (folder / "autodeco_config.json").read_bytes() == before
