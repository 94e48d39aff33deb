"""A training run from files to files, with a progress bar: what `autodeco-fast train` does."""

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.rows import encode_all, read_rows


def train_from_files(config: TrainConfig) -> None:
    """Checks the data, loads the model, trains, writes.

    Raises:
        ValueError: for input that cannot be used, before the model is loaded where possible.
    """
    raw = read_rows(config.data)
    if (config.output / CONFIG_NAME).exists():
        raise ValueError(f"output {str(config.output)!r} holds a head already; name another folder")

    from accelerate import Accelerator

    from autodeco_fast.training.base_model import load, load_tokenizer
    from autodeco_fast.training.loop import METRICS_NAME, SETTINGS_NAME, train

    rows = encode_all(load_tokenizer(config.model), raw, config.max_length)
    accelerator = Accelerator()
    base = load(config.model, torch.bfloat16, accelerator.device)
    base.verify(torch.tensor([rows[0].input_ids], device=accelerator.device))
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    console.print(f"{len(rows):,} rows of {len(raw):,} have a target; {accelerator.num_processes} × {accelerator.device}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("")

        def show(m: dict) -> None:
            text = f"loss {m['loss']:.4f}  T {m['temperature']:.3f}  coverage {m['coverage']:.3f}"
            bar.update(task, advance=1, description=text)

        train(base, rows, config, accelerator=accelerator, on_start=lambda n: bar.update(task, total=n), on_step=show)
    accelerator.end_training()
    console.print(f"written to {config.output}: the head, {METRICS_NAME}, {SETTINGS_NAME}", soft_wrap=True)
