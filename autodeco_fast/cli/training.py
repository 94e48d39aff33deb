"""The commands from text to a calibrated head: scan, train, calibrate, report."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast.cli.signature import takes, with_sizes
from autodeco_fast.training.config import ScanConfig, TrainConfig, from_yaml
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.urls import location

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
    from autodeco_fast.training.processes import end_with_a_line
    from autodeco_fast.training.run import scan_from_files

    end_with_a_line()
    scan_from_files(config)


@takes(TrainConfig, RewardConfig, required=False)
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
    """Train a temperature head, from a scan, from text, or on rewards.

    For several devices: `accelerate launch -m autodeco_fast train …`.
    """
    given = {} if config is None else from_yaml(config, RewardConfig)
    for name, value in with_sizes(TrainConfig, values).items():
        if ctx.get_parameter_source(name).name == "COMMANDLINE":
            given[name] = value
    if given.get("output") is None:
        raise ValueError("output must name a new folder")
    settings = _settings_of(given)
    from autodeco_fast.training.processes import end_with_a_line
    from autodeco_fast.training.run import train_from_files

    end_with_a_line()
    train_from_files(settings, sweep or [])


def _settings_of(given: dict) -> TrainConfig | RewardConfig:
    """The settings of the objective that is given.

    Raises:
        ValueError: for one that another objective has.
    """
    on_rewards = given.get("objective") == "rewards"
    options = RewardConfig if on_rewards else TrainConfig
    others = set(given) - {field.name for field in fields(options)}
    if others:
        whose = "objective rewards does not take" if on_rewards else "only objective rewards takes"
        raise ValueError(f"{whose} {', '.join(sorted(others))}")
    return options(**given)


def calibrate(
    head: Head,
    scan: Annotated[
        str,
        typer.Option(
            help="folder or URL of a scan of documents the head has not seen, made with "
            "--all-tokens"
        ),
    ],
    alpha: Annotated[
        float, typer.Option(help="share of reference tokens that may fall outside the cut")
    ] = 0.05,
    min_p: MinP = None,
    check: Annotated[
        list[str] | None, typer.Option(help="another scan, to see how the promise holds there")
    ] = None,
) -> None:
    """Shift a head's temperatures: the reference token is in the kept set 1 - alpha of the time."""
    from autodeco_fast.training.calibrate import calibrate_from_files

    checks = [location(other) for other in check or []]
    calibrate_from_files(head, location(scan), alpha=alpha, min_p=min_p, checks=checks)


def report(
    head: Head,
    scan: Annotated[
        list[str],
        typer.Option(
            help="folder or URL of a scan of held-out text, made with --all-tokens; give a second "
            "to compare"
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder for report.html and its figures")],
    model: Annotated[str | None, typer.Option(help="by default the one that was scanned")] = None,
    min_p: MinP = None,
) -> None:
    """Draw what a head does: one HTML page that needs nothing else, and its figures."""
    from autodeco_fast.training.report import PAGE, report_from_files

    report_from_files(head, list(map(location, scan)), output, model=model, min_p=min_p)
    typer.echo(f"written: {output / PAGE}")
