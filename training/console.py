"""What commands print while they work, and after."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def console_of(accelerator) -> Console:
    """Standard error of the main process; nothing of the others."""
    return Console(stderr=True, quiet=not accelerator.is_main_process, markup=False)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable]:
    """Yields a function (total=…, advance=…, description=…) that moves a bar on the console."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def move(**change) -> None:
            progress.update(task, **change)

        yield move


class Speed:
    """Moves a bar by examples, and says how many tokens a second they hold."""

    def __init__(self, move: Callable):
        self.move, self.tokens, self.started = move, 0, time.perf_counter()

    def __call__(self, examples: int, tokens: int) -> None:
        self.tokens += tokens
        rate = self.tokens / (time.perf_counter() - self.started)
        self.move(advance=examples, description=f"examples, {rate:,.0f} tokens/s a process")


def counted(count: int, noun: str) -> str:
    """Like 1 shard, 2,000 shards."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say_scanned(console: Console, manifest: dict) -> None:
    """What a finished scan holds."""
    counts = manifest["counts"]
    table = Table("tokens", "seen", "selected")
    for name in ("trivial", "middle", "impossible"):
        table.add_row(name, f"{counts[name]:,}", f"{counts[f'selected_{name}']:,}")
    table.add_row("all", f"{counts['seen']:,}", f"{manifest['tokens']:,}")
    console.print(table)
    if counts["not_finite"]:
        console.print(
            f"{counts['not_finite']:,} hidden states were NaN or infinite and are left out"
        )
    if manifest["share"] < 1:
        console.print(f"max_bytes leaves {manifest['share']:g} of the selected tokens")
