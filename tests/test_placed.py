"""Base models that are not whole on one device are scanned to what a whole one is."""

import textwrap

import pytest
import torch
import transformers
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook

from autodeco_fast.training import base_model
from autodeco_fast.training.scan_store import Scan, fingerprint
from tests.commands import assert_refuses, command
from tests.evaluations import run
from tests.forked import on_two_processes
from tests.scans import files, make_scan, write_examples
from tests.tiny_models import tiny_model

PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "disk",
    "lm_head": "disk",
}


def test_a_dispatched_model_is_scanned_like_a_whole_one(tmp_path):
    """Of a part that is on the disk, the LM head among it, accelerate leaves nothing in memory."""
    model = dispatch_model(
        tiny_model("llama"), PLACES, main_device="cpu", offload_dir=tmp_path / "weights"
    )
    assert model.lm_head.weight.is_meta
    assert isinstance(model.lm_head._hf_hook, AlignDevicesHook)
    base = base_model.wrap(model)
    base.verify(torch.arange(3, 10)[None])
    assert not base.weight.is_meta
    assert model.lm_head.weight.is_meta
    assert files(make_scan(tmp_path, base=base)) == files(make_scan(tmp_path, "whole"))


def test_a_dispatched_model_is_known_by_the_weights_that_are_here(tmp_path):
    """Of the others by name and shape."""
    model = dispatch_model(
        tiny_model("llama"), PLACES, main_device="cpu", offload_dir=tmp_path / "weights"
    )
    known = fingerprint(*base_model.glance(model))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert not weight.is_meta
    torch.nn.init.ones_(weight)
    assert fingerprint(*base_model.glance(model)) != known


def test_the_commands_take_a_device_map(model, tmp_path, monkeypatch):
    words = ["scan", "--model", model, "--data", write_examples(tmp_path / "rows.jsonl", 6)]
    for name, options in (("whole", []), ("mapped", ["--device-map", "auto"])):
        done = command(*words, "--output", tmp_path / name, *options)
        assert done.returncode == 0, done.stderr
    mapped, whole = files(tmp_path / "mapped"), files(tmp_path / "whole")
    for each in (mapped, whole):
        each.pop("scan.json")
    assert mapped == whole
    monkeypatch.setattr(base_model, "several", lambda: True)
    done = command(*words, "--output", tmp_path / "two", "--device-map", "auto")
    assert_refuses(done, "device_map 'auto' is for one process, got several")


@pytest.mark.usefixtures("without_figures")
def test_an_evaluation_takes_a_device_map(model, tmp_path):
    run(tmp_path, model, "whole")
    run(tmp_path, model, "mapped", device_map="auto")
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "mapped")]
    assert samples[0] == samples[1]


SHARED = """
    from pathlib import Path

    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from autodeco_fast.training import base_model
    from autodeco_fast.training.processes import start_accelerator
    from tests.scans import make_scan
    from tests.tiny_models import tiny_model

    torch.set_num_threads(1)
    folder, accelerator = Path({folder!r}), start_accelerator()
    shared = dict(data=folder / "examples.jsonl", accelerator=accelerator, max_bytes=9000)

    model = tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    base = base_model.wrap(fully_shard(model))
    base.verify(torch.arange(3, 10)[None])
    assert base.sharded and base.weight.shape == (96, 32)
    make_scan(folder, "sharded", base=base, **shared)

    model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto")
    base = base_model.wrap(model)
    base.verify(torch.arange(3, 10)[None])
    assert base.part is not None and base.weight.shape == (48, 32)
    make_scan(folder, "in slices", base=base, **shared)
    accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="leaves the LM head whole under tp_plan"
)
@pytest.mark.usefixtures("one_thread")
def test_two_processes_share_a_model(tmp_path):
    """FSDP2, whose bits are those of the whole model; tensor parallelism, where the LM head's
    statistics are merged from its slices and sums round otherwise."""
    write_examples(tmp_path / "examples.jsonl")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    code = textwrap.dedent(SHARED).format(folder=str(tmp_path))
    done = on_two_processes(code)
    assert done.returncode == 0, done.stderr
    options = {"data": tmp_path / "examples.jsonl", "max_bytes": 9000}
    whole = make_scan(tmp_path, "whole", **options)
    assert files(tmp_path / "sharded") == files(whole)
    ours, theirs = Scan(tmp_path / "in slices"), Scan(whole)
    assert ours.manifest == theirs.manifest
    a, b = ours.load(), theirs.load()
    for name in ("document", "position", "target"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    torch.testing.assert_close(a.gap, b.gap, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-4, atol=1e-5)
    assert (a.rank == b.rank).float().mean() > 0.99


def test_heads_are_not_trained_through_a_model_that_processes_share(tmp_path):
    from dataclasses import replace

    from autodeco_fast.training.batches import OnlineSource
    from tests.training_runs import make_examples, online_config

    base = replace(base_model.wrap(tiny_model("llama")), sharded=True)
    with pytest.raises(ValueError, match="a base model that processes share can be scanned"):
        OnlineSource(base, make_examples(2), online_config(tmp_path))
