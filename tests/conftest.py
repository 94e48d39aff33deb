"""Kernels run in Triton's interpreter unless a GPU is there; whatever a kernel forgets to write
shows up as NaN."""

import gc
import os
import signal
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from tests import interpreter

        interpreter.quicken()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells begin what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # until tests run: what is imported and collected is no garbage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first. A process that has nothing left takes over the last tests
    of another, and would make again what the tests of a file share."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """From here on Python looks for garbage less often, and never among what is there by now."""
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def _poison(t: torch.Tensor) -> torch.Tensor:
    if t.is_floating_point():
        return t.fill_(float("nan"))
    return (
        t if t.dtype == torch.bool or t.is_complex() else t.fill_(-77 if t.dtype.is_signed else 77)
    )


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fresh memory holds NaN (or -77) instead of whatever it held."""
    makers = {torch: ("empty", "empty_like", "empty_strided"), torch.Tensor: ("new_empty",)}
    for owner, names in makers.items():
        for name in names:
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *a, _f=original, **k: _poison(_f(*a, **k)))


@pytest.fixture(autouse=True)
def seeded():
    """Weights and data drawn without a generator are the same in every run and order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """As in processes that a launcher starts: sums of more threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny model of width 32 with a tokenizer of words."""
    from tests.commands import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def scan(model, tmp_path_factory):
    """The folder of a scan of it, every token, in two shards."""
    from tests.commands import command
    from tests.scans import write_examples

    folder = tmp_path_factory.mktemp("scanned")
    rows = write_examples(folder / "rows.jsonl", 12)
    options = (
        "--model",
        model,
        "--data",
        rows,
        "--output",
        folder / "scan",
        "--examples-per-shard",
        6,
        "--all-tokens",
    )
    done = command("scan", *options)
    assert done.returncode == 0, done.stderr
    return folder / "scan"


@pytest.fixture
def head(tmp_path):
    """The folder of a head for it."""
    from autodeco_fast import TemperatureHead

    TemperatureHead(32).save_pretrained(tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def spread_head(tmp_path):
    """The folder of a head for it whose temperatures differ."""
    from autodeco_fast import TemperatureHead

    torch.manual_seed(0)
    head = TemperatureHead(32)
    torch.nn.init.normal_(head.mlp[2].weight, std=1.5)
    head.save_pretrained(tmp_path / "spread")
    return tmp_path / "spread"


@pytest.fixture
def without_figures(monkeypatch):
    """Evaluations draw nothing, which takes longer than small ones; test_eval_page.py looks."""
    monkeypatch.setattr("autodeco_fast.training.eval_page.draw", lambda points, label: b"<svg/>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a family's AutoDeco checkpoint in a layout: heads, merged or sharded; its base
    lies beside it in `base`."""
    from tests import autodeco_checkpoints as released

    root, made = tmp_path_factory.mktemp("autodeco"), {}

    def find(family: str, layout: str = "heads"):
        if family not in made:
            base = released.base_folder(root / family / "base", family)
            released.heads_only(root / family / "heads", base)
            released.merged(root / family / "merged", base)
            released.merged(root / family / "sharded", base, sharded=True)
            made[family] = root / family
        return made[family] / layout

    return find
