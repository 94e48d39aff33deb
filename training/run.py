"""Scans and training runs from files to files, with a progress bar: what `autodeco-fast scan` and
`train` do."""

import json
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.files import output_folder, write_text
from autodeco_fast.training.config import ScanConfig, TrainConfig, sweep
from autodeco_fast.training.data import (
    encode_all,
    is_local,
    iter_rows,
    nothing_to_learn,
    read_rows,
    stream_rows,
)
from autodeco_fast.training.head_folder import METRICS_NAME, SETTINGS_NAME, SWEEP_NAME


@contextmanager
def progress_bar(console: Console):
    """Yields a function (total=…, advance=…, description=…) that moves a bar on the console."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda **change: bar.update(task, **change)


def _console(accelerator) -> Console:
    return Console(stderr=True, quiet=not accelerator.is_main_process, markup=False)


def _held(folder: Path, accelerator):
    """The output folder, held by one process of a run."""
    return output_folder(folder) if accelerator.is_main_process else nullcontext()


def scan_from_files(config: ScanConfig) -> None:
    """Checks the data, loads the model, scans, says what was kept.

    Raises:
        ValueError: for input that cannot be used, or of which nothing is kept; no scan is left
            then.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    with _held(config.output, accelerator):
        _scan(config, accelerator)
    accelerator.end_training()


def _scan(config: ScanConfig, accelerator) -> None:
    from autodeco_fast.training.base_model import facts, frozen_dtype, load, load_tokenizer
    from autodeco_fast.training.scan import scan
    from autodeco_fast.training.scan_store import discard, why_empty

    rows = None
    if is_local(config.data):  # all of it, before a model is looked at
        rows, with_ids = 0, False
        for row in iter_rows(Path(config.data)):
            rows, with_ids = rows + 1, with_ids or "input_ids" in row
        if with_ids:
            for _ in iter_rows(Path(config.data), facts(config.model).vocabulary):
                pass
    else:
        next(stream_rows(config.data, config.split), None)
    tokenizer = load_tokenizer(config.model)
    base = load(config.model, frozen_dtype(accelerator.device), accelerator.device)
    base.verify(torch.tensor([[0, 1, 2]], device=accelerator.device) % base.vocabulary)
    console = _console(accelerator)
    seen, started = 0, time.perf_counter()
    with progress_bar(console) as bar:
        bar(total=None if rows is None else -(-rows // accelerator.num_processes))

        def show(done: int, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            elapsed = time.perf_counter() - started
            bar(
                advance=done,
                description=f"rows, {seen / elapsed:,.0f} tokens/s a process",
            )

        manifest = scan(config, base, tokenizer, accelerator=accelerator, on_rows=show)
    counts = manifest["counts"]
    if not manifest["kept"]:
        accelerator.wait_for_everyone()  # until all have read the manifest
        if accelerator.is_main_process:
            discard(config.output, manifest["shards"])
        nothing = f"nothing is kept of {config.data!r}: {why_empty(manifest)}"
        raise ValueError(
            nothing
            if counts["seen"]
            else nothing_to_learn(counts["rows"], base.row_length(config.max_length))
        )
    table = Table("tokens", "seen", "kept")
    for name in ("trivial", "middle", "impossible"):
        table.add_row(name, f"{counts[name]:,}", f"{counts[f'kept_{name}']:,}")
    table.add_row("all", f"{counts['seen']:,}", f"{manifest['kept']:,}")
    console.print(table)
    if counts["not_finite"]:
        console.print(
            f"{counts['not_finite']:,} hidden states were NaN or infinite and are left out"
        )
    if manifest["share"] < 1:
        console.print(f"max_bytes leaves {manifest['share']:g} of the selected tokens")
    console.print(f"written to {config.output}: {manifest['shards']} shards", soft_wrap=True)


def _sources(config: TrainConfig, accelerator, console: Console) -> Callable[[TrainConfig], tuple]:
    """Settings → what to learn from and what to measure on; scan or model and data are opened
    once."""
    from autodeco_fast.training.batches import OnlineSource, ScanSource

    if config.scan is not None:
        from autodeco_fast.training.scan_store import Scan

        scan = Scan(config.scan)
        console.print(
            f"{len(scan):,} tokens of {scan.manifest['counts']['seen']:,} scanned; "
            f"{accelerator.device}"
        )
        return lambda settings: ScanSource(scan, settings, accelerator.device).split()
    raw = read_rows(config.data)  # complains before a model is looked at
    from autodeco_fast.training.base_model import (
        facts,
        frozen_dtype,
        load,
        load_tokenizer,
        row_length,
    )

    found = facts(config.model)
    if any("input_ids" in row for row in raw):
        read_rows(config.data, found.vocabulary)
    length = row_length(config.max_length, found.positions)
    rows = encode_all(load_tokenizer(config.model), raw, length, found.vocabulary)
    base = load(config.model, frozen_dtype(accelerator.device), accelerator.device)
    base.verify(torch.tensor([rows[0].input_ids], device=accelerator.device))
    console.print(
        f"{len(rows):,} rows of {len(raw):,} have a target; {accelerator.num_processes} × "
        f"{accelerator.device}"
    )
    return lambda settings: OnlineSource(base, rows, settings).split()


def train_from_files(config: TrainConfig, grid: list[str]) -> None:
    """Checks the input, trains one head, or one a point of the grid, and writes.

    Raises:
        ValueError: for input that cannot be used, before a model is loaded where possible.
    """
    points = sweep(config, grid) if grid else [({}, config)]
    from accelerate import Accelerator

    trackers = [
        name.strip() for name in config.report_to.split(",") if name.strip() not in ("none", "")
    ]
    accelerator = Accelerator(log_with=trackers or None, project_dir=str(config.output))
    installed = {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with}
    if not set(trackers) <= installed:
        raise ValueError(
            "report_to names trackers that are not installed: "
            f"{', '.join(sorted(set(trackers) - installed))}"
        )
    with _held(config.output, accelerator):
        _train(points, config, accelerator, trackers)
    accelerator.end_training()


def _train(
    points: list[tuple[dict, TrainConfig]], config: TrainConfig, accelerator, trackers: list[str]
) -> None:
    from autodeco_fast.training.loop import check_output

    swept, console = bool(points[0][0]), _console(accelerator)
    done = {
        settings.output
        for _, settings in points
        if config.resume and (settings.output / CONFIG_NAME).exists()
    }
    if len(done) == len(points) and (not swept or (config.output / SWEEP_NAME).exists()):
        console.print(f"{config.output} is finished: there is nothing to resume", soft_wrap=True)
        return
    for _, settings in points:
        if settings.output not in done:
            check_output(settings)
    accelerator.wait_for_everyone()  # the first to write must not be taken for somebody else
    if trackers:
        accelerator.init_trackers("autodeco_fast")
    open_source = _sources(config, accelerator, console)
    for _, settings in points:
        if settings.output not in done:
            _train_one(*open_source(settings), settings, accelerator, console, trackers)
    if not accelerator.is_main_process:
        return
    if swept:
        _tabulate(console, config, points)
    what = (
        f"{SWEEP_NAME} and a folder a head"
        if swept
        else f"the head, {METRICS_NAME}, {SETTINGS_NAME}"
    )
    console.print(f"written to {config.output}: {what}", soft_wrap=True)


def _train_one(
    source, measure_on, config: TrainConfig, accelerator, console: Console, trackers: list[str]
) -> None:
    """Trains one head."""
    from autodeco_fast.training.loop import train

    with progress_bar(console) as bar:

        def show(m: dict) -> None:
            if trackers:
                accelerator.log({k: v for k, v in m.items() if k != "step"}, step=m["step"])
            bar(
                advance=1,
                description="  ".join(
                    f"{name} {m[name]:.3f}" for name in ("loss", "temperature", "coverage")
                ),
            )

        def start(steps, done):
            return bar(total=steps, completed=done)

        train(
            source,
            config,
            measure_on=measure_on,
            accelerator=accelerator,
            on_start=start,
            on_step=show,
        )


def _tabulate(
    console: Console, config: TrainConfig, results: list[tuple[dict, TrainConfig]]
) -> None:
    """A line a point: the last step's loss, and from a scan coverage, temperature and kept-set size
    of the finished head."""
    rows = []
    for point, settings in results:
        last = json.loads(
            (settings.output / METRICS_NAME).read_text(encoding="utf-8").splitlines()[-1]
        )
        rows.append({**point, **{m: last[m] for m in ("loss", "eval_loss") if m in last}})
    if config.scan is not None and config.objective == "min_p_hinge":
        from autodeco_fast import TemperatureHead
        from autodeco_fast.training.measures import measures_of_heads
        from autodeco_fast.training.scan_store import Scan

        heads = [TemperatureHead.from_pretrained(settings.output) for _, settings in results]
        try:
            rows = [
                {**row, **measured}
                for row, measured in zip(rows, measures_of_heads(Scan(config.scan), heads))
            ]
        except (
            ValueError
        ) as error:  # the heads are trained and written: their losses are worth showing
            console.print(
                f"no coverage and kept-set size, which need the scanned model: {error}",
                soft_wrap=True,
            )
    write_text(config.output / SWEEP_NAME, json.dumps(rows, indent=1) + "\n")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    console.print(table)
