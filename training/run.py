"""Scans and training runs from files to files: what `autodeco-fast scan` and `train` do."""

import json
import math
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from autodeco_fast.checkpoint import CONFIG_NAME, SETTINGS_NAME
from autodeco_fast.files import write_text
from autodeco_fast.training.config import ScanConfig, TrainConfig, sweep
from autodeco_fast.training.console import Speed, console_of, counted, progress_bar, say_scanned
from autodeco_fast.training.data import (
    encode_all,
    is_local,
    iter_examples,
    nothing_to_learn,
    read_examples,
    stream_examples,
)
from autodeco_fast.training.head_folder import METRICS_NAME, SWEEP_NAME
from autodeco_fast.training.processes import Processes, start_accelerator
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.wishes import augmented
from autodeco_fast.urls import Location

_FEW_STEPS = 20  # of the optimizer: a head that took fewer has hardly learned


def scan_from_files(config: ScanConfig) -> None:
    """Checks the data, loads the model, scans, says what was selected.

    Raises:
        ValueError: for input that cannot be used, or of which nothing is selected; no scan is left
            then.
    """
    accelerator = start_accelerator()
    with Processes(accelerator).hold(config.output):
        _scan(config, accelerator)
    accelerator.end_training()


def _count_examples(config: ScanConfig) -> int | None:
    """Checks all examples of a file, before a model is looked at; of a dataset, the first one."""
    wished = augmented if config.wishes else iter
    if not is_local(config.data):
        next(wished(stream_examples(config.data, config.split)), None)
        return None
    count, with_ids = 0, False
    for example in wished(iter_examples(Path(config.data))):
        count, with_ids = count + 1, with_ids or "input_ids" in example
    if with_ids:
        from autodeco_fast.training.base_model import facts

        for _ in iter_examples(Path(config.data), facts(config.model).vocabulary):
            pass
    return count


def _scan(config: ScanConfig, accelerator) -> None:
    count = _count_examples(config)
    from autodeco_fast.training.base_model import frozen_dtype, load, load_tokenizer
    from autodeco_fast.training.scan import scan

    tokenizer, device = load_tokenizer(config.model), accelerator.device
    base = load(config.model, frozen_dtype(device), device, config.device_map)
    base.verify(torch.tensor([[0, 1, 2]], device=base.weight.device) % base.vocabulary)
    console = console_of(accelerator)
    with progress_bar(console) as move:
        move(total=None if count is None else -(-count // accelerator.num_processes))
        manifest = scan(config, base, tokenizer, accelerator=accelerator, on_examples=Speed(move))
    if not manifest["tokens"]:
        length = base.example_length(config.max_length)
        _refuse_empty(config, manifest, length, accelerator=accelerator)
    say_scanned(console, manifest)
    shards = counted(manifest["shards"], "shard")
    console.print(f"written to {config.output}: {shards}", soft_wrap=True)


def _refuse_empty(config: ScanConfig, manifest: dict, length: int, *, accelerator) -> None:
    from autodeco_fast.training.scan_store import discard, why_empty

    Processes(accelerator).wait()  # until all have read the manifest
    if accelerator.is_main_process:
        discard(config.output, manifest["shards"])
    counts = manifest["counts"]
    nothing = f"nothing is selected of {config.data!r}: {why_empty(manifest)}"
    raise ValueError(nothing if counts["seen"] else nothing_to_learn(counts["examples"], length))


def _check_head(config: TrainConfig, hidden_size: int) -> None:
    """Refuses a head to start from, before a model is loaded."""
    if config.head is not None:
        from autodeco_fast.training.loop import new_head, with_min_p

        new_head(with_min_p(config), hidden_size)


class _Sources:
    """What to learn from and what to measure on: a scan, or model and data, opened once."""

    def __init__(self, config: TrainConfig, accelerator, console: Console):
        self.device = accelerator.device
        if config.scan is not None:
            from autodeco_fast.training.batches import check_selection
            from autodeco_fast.training.scan_store import Scan

            self.scan = Scan(config.scan)
            check_selection(config, self.scan)
            _check_head(config, self.scan.hidden_size)
            self.base = None
            if config.objective != "min_p_hinge":
                from autodeco_fast.training.measures import scanned_model

                self.base = scanned_model(self.scan, device=self.device)
            seen = self.scan.manifest["counts"]["seen"]
            console.print(f"{len(self.scan):,} tokens of {seen:,} scanned; {self.device}")
            return
        self.scan = None
        raw = read_examples(config.data)  # complains before a model is looked at
        from autodeco_fast.training import base_model

        found = base_model.facts(config.model)
        if any("input_ids" in example for example in raw):
            read_examples(config.data, found.vocabulary)
        if config.head is not None:
            _check_head(config, base_model.width(config.model))
        length = base_model.example_length(config.max_length, found.positions)
        tokenizer = base_model.load_tokenizer(config.model)
        self.examples = encode_all(
            tokenizer, raw, length, vocabulary=found.vocabulary, ends=found.ends
        )
        dtype = base_model.frozen_dtype(self.device)
        self.base = base_model.load(config.model, dtype, self.device)
        self.base.verify(torch.tensor([self.examples[0].input_ids], device=self.device))
        console.print(
            f"{counted(len(self.examples), 'example')} of {len(raw):,} "
            f"{'has' if len(self.examples) == 1 else 'have'} a target; "
            f"{accelerator.num_processes} × {self.device}"
        )

    def open(self, config: TrainConfig) -> tuple:
        from autodeco_fast.training.batches import OnlineSource, ScanSource

        if self.scan is not None:
            return ScanSource(self.scan, config, self.device, lm_head=self.base).split()
        return OnlineSource(self.base, self.examples, config).split()


def train_from_files(config: TrainConfig | RewardConfig, grid: list[str] | None = None) -> None:
    """Checks the input, trains one head, or one a point of the grid, and writes.

    Raises:
        ValueError: for input that cannot be used, before a model is loaded where possible.
    """
    on_rewards = isinstance(config, RewardConfig)
    if on_rewards and grid:
        raise ValueError("sweep is not for objective rewards: its rounds are those of one head")
    points = sweep(config, grid) if grid else [({}, config)]
    trackers = [name.strip() for name in config.report_to.split(",")]
    trackers = [name for name in trackers if name not in ("none", "")]
    accelerator = start_accelerator(log_with=trackers or None, project_dir=str(config.output))
    installed = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if not set(trackers) <= installed:
        raise ValueError(
            "report_to names trackers that are not installed: "
            f"{', '.join(sorted(set(trackers) - installed))}"
        )
    with Processes(accelerator).hold(config.output):
        if on_rewards:
            _train_on_rewards(config, accelerator)
        else:
            _train(points, config, accelerator)
    accelerator.end_training()


def _train(points: list[tuple[dict, TrainConfig]], config: TrainConfig, accelerator) -> None:
    from autodeco_fast.training.loop import check_output

    swept, console = bool(points[0][0]), console_of(accelerator)
    if swept:
        check_output(config)
    left = [
        settings
        for _, settings in points
        if not (config.resume and (settings.output / CONFIG_NAME).exists())
    ]
    if not left and (not swept or (config.output / SWEEP_NAME).exists()):
        console.print(f"{config.output} is finished: there is nothing to resume", soft_wrap=True)
        return
    for settings in left:
        check_output(settings)
    Processes(accelerator).wait()  # the first to write must not be taken for somebody else
    if accelerator.log_with:
        accelerator.init_trackers("autodeco_fast")
    sources = _Sources(config, accelerator, console)
    for settings in left:
        _train_one(sources, settings, accelerator=accelerator, console=console)
    if not accelerator.is_main_process:
        return
    if swept:
        _tabulate(console, config, points)
    head = f"the head, {METRICS_NAME}, {SETTINGS_NAME}"
    what = f"{SWEEP_NAME} and a folder a head" if swept else head
    console.print(f"written to {config.output}: {what}", soft_wrap=True)


def _train_on_rewards(config: RewardConfig, accelerator) -> None:
    """Reads prompts and reward function or rollouts, then loads the model, trains one head."""
    from autodeco_fast.training.base_model import frozen_dtype, load, load_tokenizer
    from autodeco_fast.training.loop import check_output
    from autodeco_fast.training.prompts import read_prompts
    from autodeco_fast.training.recorded import Recorded, group_rollouts, read_rollouts
    from autodeco_fast.training.reward_function import load_function
    from autodeco_fast.training.rewards import check_head, train_on_rewards
    from autodeco_fast.training.rollouts import OnPolicy, prompts_of

    console = console_of(accelerator)
    if config.resume and (config.output / CONFIG_NAME).exists():
        console.print(f"{config.output} is finished: there is nothing to resume", soft_wrap=True)
        return
    check_output(config)
    if config.rollouts is None:
        reward, lines = load_function("reward", config.reward), read_prompts(config.prompts)
    else:
        lines = read_rollouts(config.rollouts)
    check_head(config)
    Processes(accelerator).wait()
    if accelerator.log_with:
        accelerator.init_trackers("autodeco_fast")
    tokenizer, device = load_tokenizer(config.model), accelerator.device
    base = load(config.model, frozen_dtype(device), device)
    base.verify(torch.tensor([[0, 1, 2]], device=device) % base.vocabulary)
    if config.rollouts is None:
        prompts = prompts_of(tokenizer, lines, base, config)
        rounds = OnPolicy(base, tokenizer, prompts, reward, config)
    else:
        rounds = Recorded(group_rollouts(tokenizer, lines, base, config), config)
    with progress_bar(console) as move:
        train_on_rewards(
            rounds,
            base,
            config,
            accelerator=accelerator,
            on_start=lambda rounds, done: move(total=rounds, completed=done),
            on_round=partial(_show_round, move, accelerator),
        )
    console.print(f"written to {config.output}: the head, {METRICS_NAME}, {SETTINGS_NAME}")


def _show_round(move, accelerator, metrics: dict) -> None:
    """A round's metrics on the bar and to the trackers."""
    _track(accelerator, metrics)
    reward, T, entropy, beta = (
        metrics[name] for name in ("reward", "temperature", "entropy", "entropy_weight")
    )
    told = f"reward {reward:.3f}  T {T:.3f}  entropy {entropy:.3f}  β {beta:.3g}"
    move(advance=1, description=told)


def _track(accelerator, metrics: dict) -> None:
    if accelerator.log_with:
        values = {name: value for name, value in metrics.items() if name != "step"}
        accelerator.log(values, step=metrics["step"])


def _train_one(sources: _Sources, config: TrainConfig, *, accelerator, console: Console) -> None:
    """Trains one head."""
    from autodeco_fast.training.loop import train

    source, measure_on = sources.open(config)
    planned = 0
    with progress_bar(console) as move:

        def start(steps: int, done: int) -> None:
            nonlocal planned
            planned = steps
            move(total=steps, completed=done)

        on_step = partial(_show_step, move, accelerator)
        train(
            source,
            config,
            measure_on=measure_on,
            accelerator=accelerator,
            on_start=start,
            on_step=on_step,
        )
    if planned < _FEW_STEPS:
        console.print(f"only {counted(planned, 'step')}: {_for_more_steps(config)}", soft_wrap=True)


def _for_more_steps(config: TrainConfig) -> str:
    if config.max_steps and config.max_steps < _FEW_STEPS:
        return "raise --max-steps"
    a_step = "batch-tokens" if config.scan is not None else "per-device-train-batch-size"
    return f"raise --num-train-epochs, or lower --{a_step}"


def _show_step(move, accelerator, metrics: dict) -> None:
    """A step's metrics on the bar and to the trackers."""
    _track(accelerator, metrics)
    loss, T, coverage = (metrics[name] for name in ("loss", "temperature", "coverage"))
    move(advance=1, description=f"loss {loss:.4f}  T {T:.3f}  coverage {coverage:.3f}")


def _tabulate(
    console: Console, config: TrainConfig, results: list[tuple[dict, TrainConfig]]
) -> None:
    """A line a point: the losses of the head that was written, and from a scan its measures, on
    held-out documents where there are some."""
    lines = []
    for point, settings in results:
        written = _written(settings)
        lines.append({**point, **{m: written[m] for m in ("loss", "eval_loss") if m in written}})
    if config.scan is not None:
        for line, measured in zip(lines, _measures(console, config.scan, results)):
            line.update(measured)
    write_text(config.output / SWEEP_NAME, json.dumps(lines, indent=1) + "\n")
    table = Table(*lines[0])
    for line in lines:
        table.add_row(*(f"{value:.4g}" for value in line.values()))
    console.print(table)


def _written(config: TrainConfig) -> dict:
    """The metrics of the step whose head was written: of the last, or of the best if the run stops
    early."""
    text = (config.output / METRICS_NAME).read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    if config.early_stopping_patience:
        best = min(metrics, key=lambda m: m.get("eval_loss", math.inf))
        if math.isfinite(best.get("eval_loss", math.inf)):
            return best
    return metrics[-1]


def _measures(
    console: Console, scan: Location, results: list[tuple[dict, TrainConfig]]
) -> list[dict]:
    """Of every head on the scan; none, and a line that says so, if its model is not there."""
    from autodeco_fast import TemperatureHead
    from autodeco_fast.training.measures import measures_of_heads
    from autodeco_fast.training.scan_store import Scan

    runs = [(TemperatureHead.from_pretrained(one.output), one) for _, one in results]
    try:
        return measures_of_heads(Scan(scan), runs)
    except ValueError as error:  # the heads are trained and written: their losses are worth showing
        console.print(
            f"no coverage and kept-set size, which need the scanned model: {error}", soft_wrap=True
        )
        return []
