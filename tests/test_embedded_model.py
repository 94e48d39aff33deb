"""The model that ships with the package is what its card says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.training import base_model
from autodeco_fast.training.stdlib_corpus import HEAD, HELD_OUT, read_split, split_of


def facts() -> dict:
    return json.loads((EMBEDDED_MODEL / "training.json").read_text())


def test_small_llama_in_bf16():
    weights = EMBEDDED_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert 8000 <= config["vocab_size"] <= 16_384


def test_the_card_holds_the_measured_numbers():
    card, f = (EMBEDDED_MODEL / "README.md").read_text(), facts()
    for name in ("unigram", "trigram", "model"):
        assert f"| {f[name]:.3f} | {f[name + '_byte']:.3f} |" in card
    assert f["model"] < f["trigram"] < f["unigram"]
    assert f"{f['parameters']:,} parameters" in card


def test_predicts_held_out_source_as_the_card_says():
    """The first 24 windows of held-out modules: near the card's loss, far from the unigram's."""
    base = base_model.load(str(EMBEDDED_MODEL), torch.float32)
    tokenizer = base_model.load_tokenizer(str(EMBEDDED_MODEL))
    text = "".join(text for _, text in read_split("held_out")[:6])
    ids = torch.tensor(tokenizer(text).input_ids[: 24 * 512]).view(24, 512)
    losses = [base.stats(base.hidden(window[None, :-1])[0], window[1:]) for window in ids]
    nats = torch.cat([s.logsumexp - s.target_logit for s in losses]).mean().item()
    assert abs(nats - facts()["model"]) < 0.6
    assert nats < facts()["trigram"]


def test_splits_do_not_meet():
    assert not HEAD & HELD_OUT
    assert split_of("json/decoder.py") == "held_out"
    assert split_of("email/message.py") == "head"
    assert split_of("socket.py") == "train"
    assert split_of("test/test_json/test_decode.py") is None
    paths = {
        split: {path for path, _ in read_split(split)} for split in ("train", "head", "held_out")
    }
    assert all(paths.values())
    assert (
        not paths["train"] & paths["head"]
        | paths["train"] & paths["held_out"]
        | paths["head"] & paths["held_out"]
    )


def test_no_source_text_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_split("train", tmp_path)
