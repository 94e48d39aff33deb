"""The commands that scan and train. Defaults and their meaning: `training/config.py`."""

from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast.training.config import OBJECTIVES, ScanConfig, TrainConfig, from_yaml, size

MODEL = "folder or hub id of the causal language model to read; it is not changed"


def scan(
    model: Annotated[str, typer.Option(help=MODEL)],
    data: Annotated[
        str,
        typer.Option(
            help="JSONL: prompt+completion, messages, text, or input_ids+labels; or a dataset; or stdlib:head"
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="folder for the scan; one that was begun is continued")
    ],
    split: Annotated[str, typer.Option(help="of a dataset")] = ScanConfig.split,
    all_tokens: Annotated[
        bool, typer.Option("--all-tokens", help="keep every token: to calibrate and report on")
    ] = False,
    max_length: Annotated[int, typer.Option(help="tokens of a row")] = ScanConfig.max_length,
    batch_tokens: Annotated[
        int, typer.Option(help="tokens of a forward pass")
    ] = ScanConfig.batch_tokens,
    rows_per_shard: Annotated[
        int, typer.Option(help="rows whose tokens share a file")
    ] = ScanConfig.rows_per_shard,
    max_bytes: Annotated[
        str, typer.Option(help="of the scan, like 2G; a random part is kept; 0: no limit")
    ] = "0",
    max_rank: Annotated[
        int, typer.Option(help="targets ranked lower are left out")
    ] = ScanConfig.max_rank,
    trivial_prob: Annotated[
        float, typer.Option(help="surer argmax targets are trivial")
    ] = ScanConfig.trivial_prob,
    easy_fraction: Annotated[
        float, typer.Option(help="share of trivial ones kept")
    ] = ScanConfig.easy_fraction,
    seed: Annotated[int, typer.Option(help="of what is kept")] = ScanConfig.seed,
) -> None:
    """Run the model over text once and write down what heads learn from (`accelerate launch` for
    several devices)."""
    config = ScanConfig(**{**locals(), "max_bytes": size(max_bytes)})
    from autodeco_fast.training.run import scan_from_files

    scan_from_files(config)


def train(
    ctx: typer.Context,
    output: Annotated[
        Path | None, typer.Option(help="new folder for the head and metrics.jsonl")
    ] = None,
    scan: Annotated[
        Path | None, typer.Option(help="a scan to learn from, instead of model and data")
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL: prompt+completion, messages, text, or input_ids+labels"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML with any of these settings; options given here win")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="like gravity=0.05,0.1; a head for every point of the grid"),
    ] = None,
    objective: Annotated[str, typer.Option(help=", ".join(OBJECTIVES))] = TrainConfig.objective,
    min_p: Annotated[
        float, typer.Option(help="the cut the head will be used with, in (0, 1)")
    ] = TrainConfig.min_p,
    gravity: Annotated[
        float, typer.Option(help="share of tokens allowed outside the cut")
    ] = TrainConfig.gravity,
    power: Annotated[int, typer.Option(help="of the hinge, 1 or 2")] = TrainConfig.power,
    max_length: Annotated[int, typer.Option(help="tokens of a row")] = TrainConfig.max_length,
    num_train_epochs: Annotated[
        int, typer.Option(help="passes over the data")
    ] = TrainConfig.num_train_epochs,
    max_steps: Annotated[
        int, typer.Option(help="stop after so many; 0: no limit")
    ] = TrainConfig.max_steps,
    per_device_train_batch_size: Annotated[
        int, typer.Option(help="rows")
    ] = TrainConfig.per_device_train_batch_size,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="batches")
    ] = TrainConfig.gradient_accumulation_steps,
    batch_tokens: Annotated[
        int, typer.Option(help="tokens of a step from a scan")
    ] = TrainConfig.batch_tokens,
    learning_rate: Annotated[
        float, typer.Option(help="AdamW's, after the warm-up")
    ] = TrainConfig.learning_rate,
    lr_scheduler_type: Annotated[
        str, typer.Option(help="cosine or constant")
    ] = TrainConfig.lr_scheduler_type,
    warmup_ratio: Annotated[
        float, typer.Option(help="share of the steps")
    ] = TrainConfig.warmup_ratio,
    max_rank: Annotated[
        int, typer.Option(help="targets ranked lower are left out")
    ] = TrainConfig.max_rank,
    trivial_prob: Annotated[
        float, typer.Option(help="surer argmax targets are trivial")
    ] = TrainConfig.trivial_prob,
    easy_fraction: Annotated[
        float, typer.Option(help="share of trivial ones kept")
    ] = TrainConfig.easy_fraction,
    eval_fraction: Annotated[
        float, typer.Option(help="share of the documents held out")
    ] = TrainConfig.eval_fraction,
    eval_steps: Annotated[
        int, typer.Option(help="steps between measurements on them")
    ] = TrainConfig.eval_steps,
    early_stopping_patience: Annotated[
        int, typer.Option(help="stop after so many without a better loss; 0: never")
    ] = TrainConfig.early_stopping_patience,
    save_steps: Annotated[
        int, typer.Option(help="steps between checkpoints; 0: none")
    ] = TrainConfig.save_steps,
    save_total_limit: Annotated[
        int, typer.Option(help="checkpoints kept")
    ] = TrainConfig.save_total_limit,
    max_memory: Annotated[
        str, typer.Option(help="of a scan held at a time, like 2G; 0: all of it")
    ] = "0",
    diagnostics: Annotated[
        int, typer.Option(help="tokens a batch in diagnostics.jsonl")
    ] = TrainConfig.diagnostics,
    report_to: Annotated[
        str, typer.Option(help="trackers of accelerate, or none")
    ] = TrainConfig.report_to,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the newest checkpoint")
    ] = False,
    seed: Annotated[int, typer.Option(help="of weights, order and selection")] = TrainConfig.seed,
) -> None:
    """Train a temperature head, from a scan or from text
    (`accelerate launch -m autodeco_fast train …` for several devices)."""
    values = {
        name: value for name, value in locals().items() if name not in ("ctx", "config", "sweep")
    }
    values["max_memory"] = size(max_memory)
    if config is not None:
        given = {name for name in values if ctx.get_parameter_source(name).name == "COMMANDLINE"}
        values = {**values, **{k: v for k, v in from_yaml(config).items() if k not in given}}
    if values["output"] is None:
        raise ValueError("output must name a new folder")
    settings = TrainConfig(**values)
    from autodeco_fast.training.run import train_from_files

    train_from_files(settings, sweep or [])


def calibrate(
    head: Annotated[Path, typer.Option(help="folder of a temperature head; its offset is set")],
    scan: Annotated[
        Path, typer.Option(help="of documents the head has not seen, made with --all-tokens")
    ],
    alpha: Annotated[
        float, typer.Option(help="share of reference tokens that may fall outside the cut")
    ] = 0.05,
    min_p: Annotated[
        float | None, typer.Option(help="the cut; by default the one the head was trained for")
    ] = None,
    check: Annotated[
        list[Path] | None, typer.Option(help="another scan, to see how the promise holds there")
    ] = None,
) -> None:
    """Shift a head's temperatures so that the reference token survives the cut 1 - alpha of the
    time."""
    from autodeco_fast.training.calibrate import calibrate_from_files

    calibrate_from_files(head, scan, alpha=alpha, min_p=min_p, checks=check or [])


def report(
    head: Annotated[Path, typer.Option(help="folder of a temperature head")],
    scan: Annotated[
        list[Path],
        typer.Option(help="of held-out text, made with --all-tokens; give a second to compare"),
    ],
    output: Annotated[Path, typer.Option(help="folder for report.html and its figures")],
    model: Annotated[str | None, typer.Option(help="by default the one that was scanned")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="the cut; by default the one the head was trained for")
    ] = None,
) -> None:
    """Draw what a head does: one HTML page that needs nothing else, and its figures."""
    from autodeco_fast.training.report import PAGE, report_from_files

    report_from_files(head, scan, output, model=model, min_p=min_p)
    typer.echo(f"written: {output / PAGE}")


def register(app: typer.Typer) -> None:
    for command in (scan, train, calibrate, report):
        app.command()(command)
