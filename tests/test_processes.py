"""Several processes: the same files as one, and where one of them is killed, others that say so and
a folder that any number of processes finishes to the same bits."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from autodeco_fast import TemperatureHead
from autodeco_fast.training import base_model, eval_store, evaluate, rewards, scan_store
from autodeco_fast.training.head_folder import METRICS_NAME
from tests import reward_runs
from tests.commands import ROOT, command
from tests.evaluations import config, without_speeds
from tests.forked import on_two_processes
from tests.processes import LOST, Killed, Member, assert_all_ended, killed_at, together
from tests.scans import files, make_scan, scan_together, write_examples
from tests.tiny_models import tiny_model
from tests.training_runs import equal, read_lines, train_online

HALF = {"all_tokens": False, "max_rank": 60, "easy_fraction": 0.5}
SCANS = [{**HALF, "max_bytes": budget} for budget in (0, 9000, 700)]


@pytest.mark.parametrize("options", SCANS)
def test_any_number_of_processes_makes_the_same_scan(tmp_path, options):
    whole = files(make_scan(tmp_path, "one", **options))
    for world in (2, 3):
        name = f"by {world}"
        for outcome in scan_together(tmp_path, name, world, **options):
            assert outcome == tmp_path / name
        assert files(tmp_path / name) == whole


def half_a_shard(tensors, path, *_) -> None:
    Path(path).write_bytes(b"half a shard")


KILLS = [(2, 1, 0), (2, 3, 3), (3, 2, 6), (1, 2, 10)]  # processes, then so many, at which write


@pytest.mark.parametrize(
    ("options", "world", "then", "at"),
    [
        (options, *kill)
        for options in SCANS
        for kill in KILLS
        if kill[2] < 8 or options["max_bytes"]  # without a budget there are 8 writes
    ],
)
def test_a_scan_killed_anywhere_goes_on_in_any_number(tmp_path, options, world, then, at):
    """Later writes are of shards that are thinned, where there is a budget."""
    whole = files(make_scan(tmp_path, "one", **options))
    with killed_at(at, scan_store, "save_file", half_a_shard):
        assert_all_ended(scan_together(tmp_path, "killed", world, **options))
    with pytest.raises(ValueError, match="is not finished: run the same"):
        scan_store.Scan(tmp_path / "killed")
    assert scan_together(tmp_path, "killed", then, **options)[0] == tmp_path / "killed"
    left = {name: data for name, data in files(tmp_path / "killed").items() if name[0] != "."}
    assert left == whole


@pytest.fixture
def one_at_a_time(monkeypatch):
    """transformers loads models under settings of the whole process."""
    lock = threading.Lock()

    def locked(call):
        def run(*args, **options):
            with lock:
                return call(*args, **options)

        return run

    monkeypatch.setattr(base_model, "load_causal_lm", locked(base_model.load_causal_lm))


def eval_together(folder: Path, model: Path, name: str, world: int) -> list:
    settings = config(folder, model, name, batch_size=4)

    def work(accelerator: Member) -> dict:
        return evaluate.evaluate(settings, console=Console(quiet=True), accelerator=accelerator)

    return together(world, work)


def assert_same_evaluation(folder: Path, name: str, outcomes: list) -> None:
    """As of the run named one: every process returns what one does; its samples are the bytes of
    one's."""
    results = json.loads((folder / "one/results.json").read_text())
    for outcome in outcomes:
        assert without_speeds(outcome) == without_speeds(results)
    samples = [(folder / run / "samples.jsonl").read_bytes() for run in ("one", name)]
    assert samples[0] == samples[1]
    speeds = [(folder / run / "speed.jsonl").read_bytes().count(b"\n") for run in ("one", name)]
    assert speeds[1] >= speeds[0] - 1  # a kill may come between a batch and its speed
    assert {path.name for path in (folder / name).iterdir()} == {
        path.name for path in (folder / "one").iterdir()
    }


@pytest.mark.usefixtures("without_figures", "one_at_a_time")
def test_any_number_of_processes_makes_the_same_evaluation(model, tmp_path):
    assert_same_evaluation(tmp_path, "one", eval_together(tmp_path, model, "one", 1))
    for world in (2, 5):
        outcomes = eval_together(tmp_path, model, f"by {world}", world)
        assert_same_evaluation(tmp_path, f"by {world}", outcomes)


@pytest.mark.usefixtures("without_figures", "one_at_a_time")
@pytest.mark.parametrize(("world", "then", "at"), [(2, 1, 1), (2, 3, 8), (3, 2, 17), (1, 2, 5)])
def test_an_evaluation_killed_anywhere_goes_on_in_any_number(model, tmp_path, world, then, at):
    def half_a_line(path, text):
        with path.open("a") as file:
            file.write(text[: len(text) // 2])

    eval_together(tmp_path, model, "one", 1)
    with killed_at(at, eval_store, "append_text", half_a_line):
        assert_all_ended(eval_together(tmp_path, model, "killed", world))
    outcomes = eval_together(tmp_path, model, "killed", then)
    assert_same_evaluation(tmp_path, "killed", outcomes)


def rewards_together(folder: Path, **options) -> list:
    options = {"rounds": 3, "num_iterations": 2, "save_steps": 2, "prompts_per_round": 4, **options}
    bases = [base_model.wrap(tiny_model("llama")) for _ in range(2)]  # each is attached to
    # Drawn here: torch's generator is one for all threads.
    head = rewards.new_head(rewards.with_min_p(reward_runs.config_of(folder, **options)), 32)

    def work(accelerator: Member) -> TemperatureHead:
        base = bases[accelerator.process_index]
        return reward_runs.train(folder, accelerator=accelerator, base=base, **options)[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "new_head", lambda config, width: copy.deepcopy(head))
        return together(2, work)


@pytest.mark.parametrize("at", [1, 6, 9])
def test_rewards_killed_between_the_steps_of_a_round_go_on_to_the_same_bits(tmp_path, at):
    """Of 12 calls, four a round: the first step's two and the second's."""
    whole = rewards_together(tmp_path / "whole")
    with killed_at(at, rewards, "differentiate"):
        outcomes = rewards_together(tmp_path / "killed")
    (lost,) = (outcome for outcome in outcomes if not isinstance(outcome, Killed))
    assert str(lost).startswith(LOST)
    again = rewards_together(tmp_path / "killed", resume=True)
    for head in again:
        assert equal(head, whole[0])
    heads = [(tmp_path / name / "head.safetensors").read_bytes() for name in ("killed", "whole")]
    assert heads[0] == heads[1]
    lines = [read_lines(tmp_path / name / METRICS_NAME) for name in ("killed", "whole")]
    assert lines[0] == lines[1]


LAUNCHED = """
    from pathlib import Path

    import torch
    from autodeco_fast.training import eval_page
    from autodeco_fast.training.evaluate import evaluate
    from autodeco_fast.training.processes import start_accelerator
    from tests import reward_runs
    from tests.evaluations import QUIET, config
    from tests.scans import make_scan
    from autodeco_fast.training.loop import train
    from tests.training_runs import scan_config, source_of, train_online

    torch.set_num_threads(1)
    eval_page.draw = lambda points, label: b"<svg/>"
    folder, accelerator = Path({folder!r}), start_accelerator()
    data = folder / "examples.jsonl"
    for name, output in (("a folder", folder / "by 2"), ("a URL", {url!r})):
        make_scan(folder, output=output, accelerator=accelerator, data=data, **{scan})
        learned = scan_config(folder, "from " + name, scan=output, batch_tokens=25)
        train(source_of(learned), learned, accelerator=accelerator)
    settings = config(folder, Path({model!r}), "by 2 too", batch_size=4)
    results = evaluate(settings, console=QUIET, accelerator=accelerator)
    assert results["policies"][0]["tokens_per_second"] > 0
    reward_runs.train(folder / "rewards", rounds=2, target_entropy=1.5)
    train_online(folder, "two", per_device_train_batch_size=4)
"""


@pytest.fixture(scope="module")
def launched(model, tmp_path_factory) -> Path:
    """The folder of what two processes (gloo) made that a launcher started, once."""
    folder = tmp_path_factory.mktemp("launched")
    write_examples(folder / "examples.jsonl")
    config(folder, model)  # writes the prompts
    given = {"folder": str(folder), "url": (folder / "by-2-at-a-url").as_uri()}
    code = textwrap.dedent(LAUNCHED).format(**given, model=str(model), scan=SCANS[1])
    done = on_two_processes(code)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_make_the_same_scan(launched):
    make_scan(launched, "one scan", data=launched / "examples.jsonl", **SCANS[1])
    assert files(launched / "by 2") == files(launched / "one scan")


@pytest.mark.slow
def test_two_processes_make_the_same_of_a_url(launched):
    """The same scan, and the same head from it."""
    assert files(launched / "by-2-at-a-url") == files(launched / "by 2")
    heads = [launched / f"from {name}/head.safetensors" for name in ("a folder", "a URL")]
    assert heads[0].read_bytes() == heads[1].read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures", "one_thread")
def test_two_processes_make_the_same_evaluation(model, launched):
    eval_together(launched, model, "one", 1)
    results = json.loads((launched / "by 2 too/results.json").read_text())
    assert_same_evaluation(launched, "by 2 too", [results])


@pytest.mark.slow
def test_two_processes_learn_the_same_from_rewards(launched, tmp_path):
    """Half of a round's prompts each: the same head up to rounding."""
    one, metrics = reward_runs.train(tmp_path / "one", rounds=2, target_entropy=1.5)
    two = TemperatureHead.from_pretrained(launched / "rewards")
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    lines = read_lines(launched / "rewards" / METRICS_NAME)
    assert [m["rollouts"] for m in lines] == [64, 64]
    assert [m["reward"] for m in lines] == pytest.approx([m["reward"] for m in metrics])


@pytest.mark.slow
def test_two_processes_learn_the_same_from_text(launched, tmp_path):
    """The same examples a step, split over two processes: the same head up to rounding."""
    one, metrics = train_online(tmp_path, "one", per_device_train_batch_size=8)
    two = TemperatureHead.from_pretrained(launched / "two")
    for a, b in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    lines = read_lines(launched / "two" / METRICS_NAME)
    assert [m["selected_tokens"] for m in lines] == [m["selected_tokens"] for m in metrics]
    assert [m["loss"] for m in lines] == pytest.approx([m["loss"] for m in metrics], rel=1e-5)


def environment(**more: object) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_process_whose_partner_was_killed_says_so_and_ends(model, tmp_path):
    """A scan, a real SIGKILL and no launcher that would end the other."""
    rows = write_examples(tmp_path / "rows.jsonl", 600)
    words = ["scan", "--model", model, "--data", rows, "--examples-per-shard", 3, "--output"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "autodeco_fast", *map(str, words), str(tmp_path / "killed")],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    shard = scan_store.shard_path(tmp_path / "killed", 21)
    deadline = time.monotonic() + 240
    while not shard.exists():
        assert started[1].poll() is None, started[1].stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    started[1].send_signal(signal.SIGKILL)
    _, said = started[0].communicate(timeout=240)
    started[1].communicate()
    assert started[0].returncode == 2, said
    assert said.strip().splitlines()[-1].startswith(f"error: {LOST}"), said
    for output in ("killed", "whole"):
        done = command(*words, tmp_path / output)
        assert done.returncode == 0, done.stderr
    left = {name: data for name, data in files(tmp_path / "killed").items() if name[0] != "."}
    assert left == files(tmp_path / "whole")


SLOW = """
import os, pathlib, time
def score(completions):
    pathlib.Path(f"new-{os.getpid()}").write_text(str(os.getpid()))
    os.replace(f"new-{os.getpid()}", "pid-" + os.environ.get("RANK", ""))  # never seen empty
    time.sleep(float(os.environ.get("SECONDS", "0")))
    return [float(len(c) > 9) for c in completions]
"""


@pytest.mark.slow
@pytest.mark.usefixtures("without_figures", "one_thread")
def test_a_launched_evaluation_whose_process_was_killed_goes_on(model, tmp_path, monkeypatch):
    """torchrun, which is what accelerate launches, tells the other one to end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slowly.py").write_text(SLOW)
    config(tmp_path, model)  # writes the prompts
    words = ["eval", "--model", model, "--prompts", "prompts.jsonl", "--scorer", "slowly:score"]
    words += ["--samples", 6, "--batch-size", 2, "--max-new-tokens", 6, "--dtype", "float32"]
    words += ["--policy", "static T=1 min_p=0.1", "--policy", "greedy", "--output"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = subprocess.Popen(
        [sys.executable, *launch, "-m", "autodeco_fast", *map(str, words), "killed"],
        env=environment(SECONDS="0.15"),
        stderr=subprocess.PIPE,
        text=True,
    )
    part, pid = tmp_path / "killed/part-0001/samples.jsonl", tmp_path / "pid-1"
    deadline = time.monotonic() + 240
    while not (part.exists() and part.read_bytes().count(b"\n") >= 4):
        assert started.poll() is None, started.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    _, said = started.communicate(timeout=240)
    assert started.returncode != 0
    assert re.search(f"error: told to end, as launchers do|error: {LOST}", said), said
    for output in ("killed", "whole"):
        done = command(*words, output)
        assert done.returncode == 0, done.stderr
    samples = [(tmp_path / run / "samples.jsonl").read_bytes() for run in ("killed", "whole")]
    assert samples[0] == samples[1]
    assert samples[0].count(b"\n") == 60
