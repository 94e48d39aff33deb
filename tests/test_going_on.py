"""Runs that go on: from a checkpoint, in which settings must be those it was begun with, and from a
head."""

import json
import warnings

import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import SETTINGS_NAME
from autodeco_fast.training import base_model
from autodeco_fast.training.batches import OnlineSource
from autodeco_fast.training.data import Example
from autodeco_fast.training.loop import train
from autodeco_fast.training.scan_store import file_fingerprint
from tests.tiny_models import tiny_model
from tests.training_runs import (
    make_examples,
    online_config,
    scan_config,
    source_of,
    train_from_scan,
)


class _Stopped(Exception):
    pass


@pytest.fixture
def begun(tmp_path):
    """A run that stopped after its third step, with a checkpoint of the second."""

    def stop(metrics: dict) -> None:
        if metrics["step"] == 3:
            raise _Stopped

    with pytest.raises(_Stopped):
        train_from_scan(tmp_path, save_steps=2, on_step=stop)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gravity": 0.3}, "gravity 0.1, got 0.3"),
        ({"objective": "label_free"}, "objective min_p_hinge, got label_free"),
        ({"min_p": 0.2}, "min_p 0.1, got 0.2"),
        ({"seed": 1}, "seed 0, got 1"),
        ({"max_steps": 7}, "max_steps 0, got 7"),
    ],
)
def test_other_settings_are_refused(begun, options, said):
    before = (begun / "out" / SETTINGS_NAME).read_bytes()
    with pytest.raises(ValueError, match=f"was begun with {said}: resume with the same"):
        train_from_scan(begun, save_steps=2, resume=True, **options)
    assert (begun / "out" / SETTINGS_NAME).read_bytes() == before


@pytest.mark.parametrize("name", ["trained_on", "lm_head", "tokenizer", "processes"])
def test_other_data_and_processes_are_refused(begun, name):
    path = begun / "out" / SETTINGS_NAME
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {name: "another"}))
    with pytest.raises(ValueError, match=f"was begun with {name} another, got"):
        train_from_scan(begun, save_steps=2, resume=True)


def test_online_on_other_weights_or_ids_is_refused(tmp_path):
    """Under the same LM head and file, as another adapter or chat template makes them."""
    base, examples = base_model.wrap(tiny_model("llama")), make_examples(16)

    def go_on() -> None:
        settings = online_config(tmp_path, save_steps=1, resume=True)
        train(OnlineSource(base, examples, settings), settings, on_step=stop)

    def stop(metrics: dict) -> None:
        if metrics["step"] == 2:
            raise _Stopped

    with pytest.raises(_Stopped):
        go_on()
    whole = examples[3]
    examples[3] = Example(whole.input_ids[1:], whole.labels[1:])
    with pytest.raises(ValueError, match="was begun with encoded "):
        go_on()
    examples[3] = whole
    torch.nn.init.ones_(base.model.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="was begun with weights "):
        go_on()


def test_where_things_lie_and_how_often_they_are_saved_may_change(begun):
    (begun / "scan").rename(begun / "moved")
    (begun / "out").rename(begun / "elsewhere")
    (begun / "elsewhere/.checkpoint-4.tmp").mkdir()  # a kill while saving left it
    moved = {"scan": begun / "moved", "save_steps": 1, "save_total_limit": 1}
    source = source_of(scan_config(begun, "elsewhere", **moved))
    train(source, scan_config(begun, "elsewhere", resume=True, **moved))
    assert (begun / "elsewhere/head.safetensors").is_file()
    assert not list((begun / "elsewhere").glob(".checkpoint*"))


def test_a_head_goes_on_at_its_own_cut_and_without_its_calibration(tmp_path):
    first, _ = train_from_scan(tmp_path, "first", min_p=0.05, max_steps=2)
    first.offset = 0.3
    first.save_pretrained(tmp_path / "calibrated")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, _ = train_from_scan(tmp_path, "again", head=tmp_path / "calibrated", max_steps=2)
    written = TemperatureHead.from_pretrained(tmp_path / "again")
    for head in (again, written):
        assert (head.min_p, head.offset) == (0.05, 0.0)
    assert json.loads((tmp_path / "again" / SETTINGS_NAME).read_text())["min_p"] == 0.05
    with pytest.warns(UserWarning, match="the head was made for Min-P 0.05: at 0.2"):
        other, _ = train_from_scan(
            tmp_path, "other", head=tmp_path / "calibrated", min_p=0.2, max_steps=2
        )
    assert (other.min_p, other.offset) == (0.2, 0.0)


def test_online_runs_know_their_data(tmp_path):
    """So that `calibrate` can say that a head has seen it."""
    settings = online_config(tmp_path)
    settings.data.write_text('{"text": "a"}\n')
    source = OnlineSource(base_model.wrap(tiny_model("llama")), make_examples(2), settings)
    assert source.identity()["trained_on"] == file_fingerprint(settings.data)


def test_orders_of_neighbouring_seeds_are_their_own(tmp_path):
    """Not those of the next epoch."""
    train_from_scan(tmp_path, max_steps=1)

    def first(seed: int, epoch: int) -> list[float]:
        source = source_of(scan_config(tmp_path, seed=seed))
        return next(source.batches(epoch, 0, 0, 1)).stats.max_logit.tolist()

    assert len({tuple(first(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
