"""The commands for checkpoints in AutoDeco's released format: construct, merge, split."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast.cli.generation import Seed

_LARGE = 1 << 28  # bytes from which on writing them is shown

Base = Annotated[str, typer.Option(help="folder or hub id of the base model")]
Output = Annotated[Path, typer.Option(help="the new folder")]


def construct(
    base: Base,
    output: Output,
    head: Annotated[
        str | None, typer.Option(help="folder or hub id of a temperature head; else a new one")
    ] = None,
    top_p_head: Annotated[
        str | None, typer.Option(help="folder or hub id of a top-p head; else a new one")
    ] = None,
    seed: Annotated[int, Seed] = 0,
) -> None:
    """Make a heads-only AutoDeco checkpoint, of heads of yours or of new ones.

    With one head given, the other is not used.
    """
    from autodeco_fast.autodeco import convert

    convert.construct(base, output, head=head, top_p_head=top_p_head, seed=seed)
    typer.echo(f"written: {output}")


def merge(
    base: Base,
    heads: Annotated[str, typer.Option(help="folder or hub id of a heads-only checkpoint")],
    output: Output,
) -> None:
    """Join a base model and a heads-only AutoDeco checkpoint into one folder."""
    from autodeco_fast.autodeco import convert

    with _progress() as progress:
        convert.merge(base, heads, output, progress=progress)
    typer.echo(f"written: {output}")


def split(
    checkpoint: Annotated[str, typer.Option(help="folder or hub id of an AutoDeco checkpoint")],
    output: Output,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="base (the model as it was), autodeco (a heads-only checkpoint) or head (a head "
            "folder, for attach and --head), several times; by default all there are"
        ),
    ] = None,
) -> None:
    """Take an AutoDeco checkpoint apart: base model, heads-only checkpoint, head folder."""
    from autodeco_fast.autodeco import convert

    with _progress() as progress:
        convert.split(checkpoint, output, parts=part or (), progress=progress)
    typer.echo(f"written: {output}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yields a function (bytes done, bytes of all) that shows a bar if it is worth one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("")

    def show(done: int, total: int) -> None:
        if total >= _LARGE:
            bar.start()
            bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
