"""Scans: what is written, what is kept, being killed, several processes, what is refused."""

import json
import os
import signal
import stat
import sys
import textwrap

import pytest
import torch

from autodeco_fast.losses import difficulty
from autodeco_fast.training import base_model
from autodeco_fast.training.data import Example
from autodeco_fast.training.scan import batches_by_length
from autodeco_fast.training.scan_store import (
    FIELDS,
    Scan,
    ScanTokens,
    discard,
    read_manifest,
    shard_path,
)
from tests.forked import forked
from tests.scans import Vocabulary, make_scan, write_examples
from tests.tiny_models import VOCAB, tiny_model

HALF = {"all_tokens": False, "max_rank": 60, "easy_fraction": 0.5}


def same(a: ScanTokens, b: ScanTokens) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("hidden", *FIELDS))


def test_holds_what_the_model_says(tmp_path):
    base = base_model.wrap(tiny_model("llama"))
    scan = Scan(make_scan(tmp_path, base=base))
    tokens = scan.load()
    examples = [
        json.loads(line)["input_ids"]
        for line in (tmp_path / "examples.jsonl").read_text().splitlines()
    ]
    assert len(scan) == sum(len(ids) - 1 for ids in examples) == scan.manifest["counts"]["seen"]
    assert scan.manifest["counts"]["examples"] == 30 and len(scan.paths) == 8  # noqa: PT018
    at = 0
    for number, ids in enumerate(examples):
        of_document = tokens[at : at + len(ids) - 1]
        at += len(ids) - 1
        assert of_document.document.unique().tolist() == [number]
        assert of_document.position.tolist() == list(range(1, len(ids)))
        assert of_document.target.tolist() == ids[1:]
        z = base.model(torch.tensor([ids])).logits[0, :-1].float()
        z_y = z.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(of_document.gap, z.amax(-1) - z_y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            of_document.target_prob, (z_y - z.logsumexp(-1)).exp(), rtol=1e-4, atol=1e-6
        )
        assert of_document.rank.tolist() == (z > z_y[:, None]).sum(-1).tolist()
        torch.testing.assert_close(
            of_document.hidden.float(),
            base.hidden(torch.tensor([ids]))[0, :-1],
            rtol=1e-2,
            atol=1e-2,
        )


def test_size_is_what_was_promised(tmp_path):
    scan = Scan(make_scan(tmp_path, examples_per_shard=100))
    header = 8 + int.from_bytes(scan.paths[0].read_bytes()[:8], "little")
    assert scan.paths[0].stat().st_size - header <= len(scan) * (2 * scan.hidden_size + 32)


def test_the_mix(tmp_path):
    """All of the middle, a share of the trivial, none of the impossible."""
    limits = {"max_rank": VOCAB // 2, "trivial_prob": 0.0}
    everything = Scan(make_scan(tmp_path, "all")).load()
    scan = Scan(make_scan(tmp_path, "some", all_tokens=False, easy_fraction=0.5, **limits))
    counts, bucket = scan.manifest["counts"], difficulty(everything.stats(), **limits)
    assert [counts[n] for n in ("trivial", "middle", "impossible")] == [
        int((bucket == i).sum()) for i in range(3)
    ]
    assert counts["selected_middle"] == counts["middle"]
    assert 0 < counts["selected_trivial"] < counts["trivial"]
    assert len(scan) == counts["selected_middle"] + counts["selected_trivial"]
    left = difficulty(scan.load().stats(), **limits)
    assert not (left == 2).any()


def test_a_byte_budget_is_kept(tmp_path):
    whole = Scan(make_scan(tmp_path, "whole"))
    token = 2 * whole.hidden_size + 28
    scan = Scan(make_scan(tmp_path, "less", max_bytes=token * len(whole) // 3))
    assert 0 < len(scan) <= len(whole) // 3
    assert scan.manifest["share"] in (0.25, 0.125)
    assert scan.manifest["counts"]["seen"] == len(whole)
    pairs = {(int(d), int(p)) for d, p in zip(whole.load().document, whole.load().position)}
    less = scan.load()
    assert {(int(d), int(p)) for d, p in zip(less.document, less.position)} <= pairs


def test_does_not_depend_on_the_batches(tmp_path):
    a, b = (
        Scan(make_scan(tmp_path, str(size), batch_tokens=size, **HALF)).load() for size in (20, 500)
    )
    assert torch.equal(a.document, b.document)
    assert torch.equal(a.position, b.position)
    torch.testing.assert_close(a.gap, b.gap, rtol=1e-4, atol=1e-5)


def test_batches_are_full_and_of_one_length():
    examples = [
        (i, Example([1] * length, [1] * length)) for i, length in enumerate([3, 9, 4, 9, 3, 2, 30])
    ]
    batches = list(batches_by_length(examples, 18))
    assert [[len(example.input_ids) for _, example in batch] for batch in batches] == [
        [30],
        [9, 9],
        [4, 3, 3, 2],
    ]


KILLED = """
    import os, signal
    from pathlib import Path
    import autodeco_fast.training.scan_store as store
    from tests.scans import make_scan

    written, save = 0, store.save_file

    def dying(tensors, path, metadata):
        global written
        if written == {shards}:
            Path(path).write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, path, metadata=metadata)
        written += 1

    store.save_file = dying
    make_scan(Path({folder!r}), "killed", **{half}, max_bytes={budget})
"""


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 9000])
def test_survives_being_killed(tmp_path, budget):
    whole = Scan(make_scan(tmp_path, "whole", **HALF, max_bytes=budget))
    for shards in (2, 3):  # twice; the second time some are there already
        code = textwrap.dedent(KILLED).format(
            shards=shards, folder=str(tmp_path), budget=budget, half=HALF
        )
        done = forked(code)
        assert done.returncode == -signal.SIGKILL, done.stderr
        with pytest.raises(ValueError, match="is not finished: run the same"):
            Scan(tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("shard-*"))) >= 2
    continued = Scan(make_scan(tmp_path, "killed", **HALF, max_bytes=budget))
    assert continued.manifest == whole.manifest
    assert same(continued.load(), whole.load())


def test_finished_shards_are_not_made_again(tmp_path):
    folder = make_scan(tmp_path)
    (folder / "scan.json").write_text(
        json.dumps(
            {
                k: v
                for k, v in read_manifest(folder).items()
                if k not in ("counts", "share", "shards", "tokens")
            }
        )
    )
    shard_path(folder, 3).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    make_scan(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert shard_path(folder, 3).exists()


def test_hidden_states_that_are_nan_are_counted_and_dropped(tmp_path):
    base = base_model.wrap(tiny_model("llama"))
    examples = [
        json.loads(line)["input_ids"]
        for line in write_examples(tmp_path / "examples.jsonl").read_text().splitlines()
    ]
    bad = examples[0][0]
    base.model.get_input_embeddings().weight[bad] = float("nan")
    scan = Scan(make_scan(tmp_path, base=base))
    assert scan.manifest["counts"]["not_finite"] > 0
    assert len(scan) == scan.manifest["counts"]["seen"] - scan.manifest["counts"]["not_finite"]
    assert scan.load().gap.isfinite().all()


def test_what_cannot_be_continued_is_refused(tmp_path):
    make_scan(tmp_path)
    for options, words in (
        ({"seed": 1}, "holds a scan with seed 0, not 1"),
        ({"tokenizer": Vocabulary("x")}, "holds a scan of another tokenizer"),
        ({"base": base_model.wrap(tiny_model("granite"))}, "holds a scan of another lm_head"),
        (
            {"data": write_examples(tmp_path / "others.jsonl", seed=1)},
            "holds a scan (of other data: .*|with data .*); name another folder$",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make_scan(tmp_path, **options)


def test_shards_without_a_manifest_are_no_beginning(tmp_path, monkeypatch):
    folder = make_scan(tmp_path)
    (folder / "scan.json").unlink()
    with pytest.raises(ValueError, match=r"holds shards of a scan and no scan\.json"):
        make_scan(tmp_path, seed=1)
    removed = []
    monkeypatch.setattr(type(folder), "unlink", lambda path, **_: removed.append(path.name))
    discard(folder, 2)
    assert removed == ["shard-000000.safetensors", "shard-000001.safetensors", "scan.json"]


def test_broken_shards_are_named(tmp_path):
    folder = make_scan(tmp_path)
    path = shard_path(folder, 2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-000002\.safetensors is not a whole shard"):
        Scan(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-000002\.safetensors is not a whole shard"):
        Scan(folder)


def test_the_same_scan_makes_the_same_bytes(tmp_path):
    one, two = (make_scan(tmp_path, name) for name in ("one", "two"))
    for path in sorted(one.iterdir()):
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_files_have_the_permissions_of_the_user(tmp_path):
    before = os.umask(0o027)
    try:
        folder = make_scan(tmp_path)
    finally:
        os.umask(before)
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autodeco_fast.training.scan_store.save_file", full)
    with pytest.raises(
        ValueError, match=r"cannot write .*shard-000000\.safetensors.*No space left"
    ):
        make_scan(tmp_path)
    assert not list((tmp_path / "scan").glob("*.tmp"))


@pytest.mark.parametrize("likely", [True, False])
def test_an_empty_selection_names_the_filter(tmp_path, likely):
    base, path = base_model.wrap(tiny_model("llama")), tmp_path / "few.jsonl"
    with path.open("w") as file:
        for first in range(3, 9):
            z = base.model(torch.tensor([[first]])).logits[0, -1]
            target = int(z.argmax() if likely else z.argmin())
            file.write(json.dumps({"input_ids": [first, target], "labels": [-100, target]}) + "\n")
    folder = make_scan(
        tmp_path,
        base=base,
        data=path,
        all_tokens=False,
        max_rank=50,
        trivial_prob=0.0,
        easy_fraction=0.0,
    )
    filter_ = "easy_fraction" if likely else "max_rank"
    with pytest.raises(ValueError, match=f"holds no token: {filter_} dropped all 6 targets"):
        Scan(folder)


def test_datasets_are_read_by_name(tmp_path, monkeypatch):
    import types

    examples = [
        json.loads(line) | {"other": 1}
        for line in write_examples(tmp_path / "examples.jsonl", 5).read_text().splitlines()
    ]
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return iter(examples)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    scan = Scan(make_scan(tmp_path, data="somebody/something", split="dev"))
    assert asked == [("somebody/something", "dev", True)]
    assert scan.manifest["counts"]["examples"] == 5
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match="data must be a JSONL file or a dataset's name, got 'nowhere'"
    ):
        make_scan(tmp_path, "other", data="nowhere")
