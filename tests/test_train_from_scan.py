"""Training from a scan, resuming, stopping early, sweeping, staying within memory."""

import json
import shutil
import signal
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model, checkpoints
from autodeco_fast.training.batches import OnlineSource, ScanSource
from autodeco_fast.training.config import from_yaml, sweep
from autodeco_fast.training.head_folder import DIAGNOSTICS_NAME, METRICS_NAME
from autodeco_fast.training.loop import train
from autodeco_fast.training.objectives import MinPHinge
from autodeco_fast.training.predictions import predict
from autodeco_fast.training.run import train_from_files
from autodeco_fast.training.scan_store import Scan, ScanTokens, read_facts, write_shard
from tests.forked import forked, on_two_processes
from tests.scans import make_scan
from tests.tiny_models import tiny_model
from tests.training_runs import (
    LONG,
    equal,
    make_examples,
    online_config,
    read_lines,
    scan_config,
    source_of,
    train_from_scan,
    train_online,
)


def test_a_scan_teaches_what_text_teaches(tmp_path):
    """One step on all tokens: the gradient does not care where the hidden states came from."""
    settings = online_config(tmp_path, "online", per_device_train_batch_size=64)
    base = base_model.wrap(tiny_model("llama"))
    data = [r._replace(labels=[-100, *r.input_ids[1:]]) for r in make_examples(16)]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(r._asdict()) + "\n" for r in data))
    make_scan(tmp_path, data=path, base=base)
    head, metrics = train_from_scan(tmp_path, batch_tokens=10**6)
    online = train(OnlineSource(base, data, settings), settings)
    for a, b in zip(head.parameters(), online.parameters()):
        torch.testing.assert_close(
            a, b, rtol=1e-3, atol=1e-4
        )  # the scan keeps hidden states in bf16
    assert metrics[0]["target_tokens"] == sum(len(r.input_ids) - 1 for r in data)


def test_every_token_is_seen_once_an_epoch(tmp_path):
    make_scan(tmp_path)
    for options in ({}, {"max_memory": 20_000}, {"eval_fraction": 0.3}):
        settings = scan_config(tmp_path, **options)
        source, other = source_of(settings).split()
        seen = [
            batch.hidden
            for rank in range(2)
            for step in range(source.steps_per_epoch(2))
            for batch in source.batches(1, step, rank, 2)
        ]
        ours = torch.cat(seen).float().sort(0).values
        whole = Scan(settings.scan).load()
        if other is not None:
            whole = whole[~other._wanted(whole.document)]
            assert len(other) + len(whole) == len(Scan(settings.scan))
        assert torch.equal(ours, whole.hidden.float().sort(0).values)


def test_a_shard_without_tokens_is_passed_over(tmp_path):
    scan = Scan(make_scan(tmp_path))
    counts, share, n = read_facts(scan.paths[-1], scan.hidden_size)
    write_shard(scan.paths[-1], ScanTokens.none(scan.hidden_size), counts, share)
    for options in ({}, {"max_memory": 2000}, {"eval_fraction": 0.3}):
        learn, measure = source_of(scan_config(tmp_path, **options)).split()
        assert len(learn) + (len(measure) if measure else 0) == len(scan) - n
    _, metrics = train_from_scan(tmp_path, num_train_epochs=1)
    assert sum(m["target_tokens"] for m in metrics) == len(scan) - n


def test_memory_stays_within_the_limit(tmp_path, monkeypatch):
    make_scan(tmp_path, examples_per_shard=20)  # a shard is larger than the limit
    limit = 12_000
    held = []
    group = ScanSource._group

    def watched(self, *arguments):
        tokens = group(self, *arguments)
        held.append(len(tokens) * (2 * self.hidden_size + 28))
        return tokens

    monkeypatch.setattr(ScanSource, "_group", watched)
    train_from_scan(tmp_path, max_memory=limit, num_train_epochs=2)
    assert len(held) > 10  # several groups an epoch
    assert 5 * max(held) <= limit


def test_order_differs_by_epoch_and_seed(tmp_path):
    make_scan(tmp_path)

    def first(seed, epoch):
        source = source_of(scan_config(tmp_path, seed=seed))
        return next(source.batches(epoch, 0, 0, 1)).stats.max_logit

    assert torch.equal(first(0, 0), first(0, 0))
    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))


KILLED = """
    import os, signal
    from pathlib import Path
    from autodeco_fast.training import checkpoints
    from tests.training_runs import train_from_scan

    plain = checkpoints.save_file

    def save_file(tensors, path):
        if {during_save} and "checkpoint-{step}" in str(path) and "optimizer" in str(path):
            Path(path).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        plain(tensors, path)

    def on_step(metrics):
        if metrics["step"] == {step} and not {during_save}:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = save_file
    train_from_scan(Path({folder!r}), "killed", on_step=on_step, resume=True, **{options!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("early", [0, 2])
def test_resume_is_exact(tmp_path, early):
    options = {**LONG, "early_stopping_patience": early, "diagnostics": 2}
    whole, metrics = train_from_scan(tmp_path, "whole", **options)
    assert len(metrics) > 8 or early
    for step, during_save in ((1, False), (3, False), (4, True), (7, False)):
        if step >= len(metrics):
            continue
        code = textwrap.dedent(KILLED).format(
            folder=str(tmp_path), step=step, during_save=during_save, options=options
        )
        done = forked(code)
        assert done.returncode == -signal.SIGKILL, done.stderr
    resumed, again = train_from_scan(tmp_path, "killed", resume=True, **options)
    assert equal(resumed, whole)
    assert again == metrics
    lines = [read_lines(tmp_path / name / DIAGNOSTICS_NAME) for name in ("whole", "killed")]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_resume_of_two_processes_is_exact(tmp_path):
    make_scan(tmp_path)

    def launch(name: str, kill_at: int, resume: bool) -> int:
        code = textwrap.dedent(f"""
            import os, signal
            from pathlib import Path
            from tests.training_runs import LONG, train_from_scan

            def stop(metrics):
                if metrics["step"] == {kill_at}:
                    os.kill(os.getpid(), signal.SIGKILL)

            options = {{**LONG, "batch_tokens": 25, "resume": {resume}}}
            train_from_scan(Path({str(tmp_path)!r}), {name!r}, on_step=stop, **options)
            """)
        return on_two_processes(code).returncode

    assert launch("whole", 0, False) == 0
    assert launch("killed", 5, False) != 0
    assert launch("killed", 0, True) == 0
    heads = [TemperatureHead.from_pretrained(tmp_path / name) for name in ("whole", "killed")]
    assert equal(*heads)
    one, _ = train_from_scan(tmp_path, "one", **LONG)
    for a, b in zip(one.parameters(), heads[0].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_checkpoints_are_limited_and_not_overwritten(tmp_path):
    train_from_scan(tmp_path, **{**LONG, "save_total_limit": 2})
    names = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert len(names) == 2
    (tmp_path / "out/autodeco_config.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints; give --resume to continue"):
        train_from_scan(tmp_path, **LONG)
    (tmp_path / "out" / names[-1] / checkpoints.OPTIMIZER).write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{names[-1]} is not a checkpoint of this head"):
        train_from_scan(tmp_path, resume=True, **LONG)


def test_stops_early_and_keeps_the_best(tmp_path):
    options = {"num_train_epochs": 60, "learning_rate": 0.3, "eval_fraction": 0.3, "eval_steps": 2}
    head, metrics = train_from_scan(tmp_path, early_stopping_patience=3, **options)
    losses = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    best = losses.index(min(losses))
    assert len(losses) == best + 4
    settings = scan_config(tmp_path, **options)
    _, measure_on = source_of(settings).split()
    from autodeco_fast.training.loop import held_out_loss
    from autodeco_fast.training.processes import Processes

    objective = MinPHinge(max_rank=2**31 - 1, easy_fraction=1.0)
    assert held_out_loss(measure_on, head, objective, Processes()) == pytest.approx(
        losses[best], rel=1e-6
    )


def test_settings_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("gravity: 0.2\nscan: there\n")
    assert from_yaml(path) == {"gravity": 0.2, "scan": Path("there")}
    path.write_text("gravty: 0.2\n")
    with pytest.raises(ValueError, match="unknown setting gravty; did you mean gravity"):
        from_yaml(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        from_yaml(path)


def test_the_grid_of_a_sweep(tmp_path):
    points = sweep(scan_config(tmp_path), ["gravity=0.02,0.05 min_p=0.1", "power=1,2"])
    assert [list(point.values()) for point, _ in points] == [
        [0.02, 0.1, 1],
        [0.02, 0.1, 2],
        [0.05, 0.1, 1],
        [0.05, 0.1, 2],
    ]
    assert len({settings.output for _, settings in points}) == 4
    for entry, words in (
        ("gravity", "sweep must be like"),
        ("objective=a", "sweep must be like"),
        ("gravity=a", "list numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            sweep(scan_config(tmp_path), [entry])


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1, 10**13])
def test_any_seed_of_64_bits_will_do(tmp_path, seed):
    head, metrics = train_from_scan(
        tmp_path, seed=seed, easy_fraction=0.5, trivial_prob=0.0, eval_fraction=0.3, eval_steps=1
    )
    again, _ = train_from_scan(
        tmp_path,
        "again",
        seed=seed,
        easy_fraction=0.5,
        trivial_prob=0.0,
        eval_fraction=0.3,
        eval_steps=1,
    )
    assert equal(head, again)
    assert metrics


def test_checkpoints_that_hold_nonsense_are_refused(tmp_path):
    train_from_scan(tmp_path, **LONG)
    (tmp_path / "out/autodeco_config.json").unlink()
    newest = checkpoints.newest(tmp_path / "out")
    state = json.loads((newest / checkpoints.STATE).read_text())
    for text in (
        "[]",
        "{",
        "{}",
        json.dumps({**state, "step": "4"}),
        json.dumps({**state, "best_loss": None}),
    ):
        (newest / checkpoints.STATE).write_text(text)
        with pytest.raises(ValueError, match=f"{newest.name} is not a checkpoint of this head"):
            train_from_scan(tmp_path, resume=True, **LONG)


def test_metrics_are_reported(tmp_path, monkeypatch):
    from accelerate import tracking
    from accelerate.utils import LoggerType

    class Remembers(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", False, None
        records: ClassVar[list[tuple[int, dict]]] = []

        def __init__(self, run_name, **options):
            super().__init__()

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **options):
            self.records.append((step, values))

    make_scan(tmp_path)
    settings = scan_config(tmp_path, report_to="tensorboard")
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(
        ValueError, match="report_to names trackers that are not installed: tensorboard"
    ):
        train_from_files(settings, [])
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Remembers)
    train_from_files(settings, [])
    metrics = read_lines(tmp_path / "out" / METRICS_NAME)
    assert [step for step, _ in Remembers.records] == [m["step"] for m in metrics]
    assert [values["loss"] for _, values in Remembers.records] == [m["loss"] for m in metrics]


def test_a_sweep_shows_the_head_that_was_written(tmp_path):
    """The best one's losses, and its measures on the documents that it never saw."""
    folder = tmp_path / "model"
    tiny_model("llama").bfloat16().save_pretrained(folder)
    made = make_scan(tmp_path, base=base_model.load(str(folder), torch.bfloat16), model=str(folder))
    options = {"num_train_epochs": 20, "learning_rate": 0.3, "eval_fraction": 0.3, "eval_steps": 1}
    settings = scan_config(tmp_path, early_stopping_patience=2, **options)
    train_from_files(settings, ["gravity=0.05,0.5"])
    table = json.loads((tmp_path / "out/sweep.json").read_text())
    scan, differs = Scan(made), 0
    for line in table:
        output = tmp_path / f"out/gravity={line['gravity']:g}"
        metrics = read_lines(output / METRICS_NAME)
        best = min(metrics, key=lambda m: m["eval_loss"])
        assert (line["loss"], line["eval_loss"]) == (best["loss"], best["eval_loss"])
        differs += line["eval_loss"] < metrics[-1]["eval_loss"]
        _, measure_on = source_of(settings).split()
        tokens = ScanTokens.cat([measure_on._read(one) for one in measure_on.slices])
        assert 0 < len(tokens) < len(scan)
        T = torch.from_numpy(predict(TemperatureHead.from_pretrained(output), tokens))
        assert line["temperature"] == pytest.approx(T.double().mean().item())
    assert differs  # the last head is not the best


def test_diagnostics_are_so_many_tokens_of_a_step(tmp_path):
    """However many batches it is of."""
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "diagnostics": 12}
    for name, batches in (("one", 1), ("four", 4)):
        train_online(tmp_path, name, gradient_accumulation_steps=batches, **options)
    steps = [line["step"] for line in read_lines(tmp_path / "four" / DIAGNOSTICS_NAME)]
    assert steps == [step for step in (1, 2, 3, 4) for _ in range(12)]
    every = [read_lines(tmp_path / name / METRICS_NAME) for name in ("one", "four")]
    assert max(m["target_tokens"] for m in every[0]) < 12  # so that a step takes two batches


def test_a_sweep_tabulates_every_point(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model("llama").bfloat16().save_pretrained(folder)
    make_scan(tmp_path, base=base_model.load(str(folder), torch.bfloat16), model=str(folder))
    settings = scan_config(tmp_path, num_train_epochs=20, learning_rate=3e-3)
    train_from_files(settings, ["gravity=0.05,0.5"])
    table = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [line["gravity"] for line in table] == [0.05, 0.5]
    assert table[0]["coverage"] > table[1]["coverage"]
    assert table[0]["kept_set_size"] > table[1]["kept_set_size"] > 1
    assert table[0]["oracle_kept_set_size"] == table[1]["oracle_kept_set_size"]
    with pytest.raises(ValueError, match="holds a head already"):
        train_from_files(settings, ["gravity=0.05,0.5"])
    shutil.rmtree(tmp_path / "out/gravity=0.5")  # as if it had been killed before the second point
    first = (tmp_path / "out/gravity=0.05/head.safetensors").stat().st_mtime_ns
    train_from_files(replace(settings, resume=True), ["gravity=0.05,0.5"])
    assert json.loads((tmp_path / "out/sweep.json").read_text()) == table
    assert (tmp_path / "out/gravity=0.05/head.safetensors").stat().st_mtime_ns == first
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "out")
    train_from_files(settings, ["gravity=0.05,0.5"])
    assert "which need the scanned model: model must be a folder" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scan": None}, "give either scan, or both model and data"),
        ({"model": "m"}, "scan holds what model and data would give"),
        (
            {"objective": "x"},
            r"objective must be one of min_p_hinge, label_free, .*, got 'x'",
        ),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_fraction"),
        (
            {"lr_scheduler_type": "polynomial"},
            "lr_scheduler_type must be one of cosine, linear, constant, got 'polynomial'",
        ),
    ],
)
def test_settings_are_checked(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        scan_config(tmp_path, **options)
