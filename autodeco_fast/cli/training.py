"""The commands from text to a calibrated head: scan, train, calibrate, report."""

from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast.cli.signature import takes, with_sizes
from autodeco_fast.training.config import ScanConfig, TrainConfig, from_yaml

Head = Annotated[Path, typer.Option(help="folder of a temperature head")]
MinP = Annotated[
    float | None, typer.Option(help="the cut; by default the one the head was trained for")
]


@takes(ScanConfig)
def scan(**values: object) -> None:
    """Run the model over text once and write down what heads learn from.

    For several devices: `accelerate launch -m autodeco_fast scan …`.
    """
    config = ScanConfig(**with_sizes(ScanConfig, values))
    from autodeco_fast.training.run import scan_from_files

    scan_from_files(config)


@takes(TrainConfig, required=False)
def train(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="YAML with any of these settings; options given here win")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="like gravity=0.05,0.1; a head for every point of the grid"),
    ] = None,
    **values: object,
) -> None:
    """Train a temperature head, from a scan or from text.

    For several devices: `accelerate launch -m autodeco_fast train …`.
    """
    values = with_sizes(TrainConfig, values)
    if config is not None:
        given = {name for name in values if ctx.get_parameter_source(name).name == "COMMANDLINE"}
        values |= {name: v for name, v in from_yaml(config).items() if name not in given}
    if values["output"] is None:
        raise ValueError("output must name a new folder")
    settings = TrainConfig(**values)
    from autodeco_fast.training.run import train_from_files

    train_from_files(settings, sweep or [])


def calibrate(
    head: Head,
    scan: Annotated[
        Path, typer.Option(help="of documents the head has not seen, made with --all-tokens")
    ],
    alpha: Annotated[
        float, typer.Option(help="share of reference tokens that may fall outside the cut")
    ] = 0.05,
    min_p: MinP = None,
    check: Annotated[
        list[Path] | None, typer.Option(help="another scan, to see how the promise holds there")
    ] = None,
) -> None:
    """Shift a head's temperatures: the reference token is in the kept set 1 - alpha of the time."""
    from autodeco_fast.training.calibrate import calibrate_from_files

    calibrate_from_files(head, scan, alpha=alpha, min_p=min_p, checks=check or [])


def report(
    head: Head,
    scan: Annotated[
        list[Path],
        typer.Option(help="of held-out text, made with --all-tokens; give a second to compare"),
    ],
    output: Annotated[Path, typer.Option(help="folder for report.html and its figures")],
    model: Annotated[str | None, typer.Option(help="by default the one that was scanned")] = None,
    min_p: MinP = None,
) -> None:
    """Draw what a head does: one HTML page that needs nothing else, and its figures."""
    from autodeco_fast.training.report import PAGE, report_from_files

    report_from_files(head, scan, output, model=model, min_p=min_p)
    typer.echo(f"written: {output / PAGE}")
