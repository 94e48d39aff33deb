"""The `autodeco-fast` command.

Bad input is one line on standard error and exit code 2, before any model is loaded. Options may be
written with underscores, as transformers' and TRL's scripts have them: --learning_rate.
"""

import sys
import warnings
from typing import Annotated

import typer

from autodeco_fast import __version__
from autodeco_fast.cli import checkpoints, doctor, evaluation, generation, training
from autodeco_fast.errors import USERS, line


def _help(docstring: str | None) -> str:
    """Each paragraph in one line: typer keeps the breaks within them."""
    return "\n\n".join(" ".join(each.split()) for each in (docstring or "").split("\n\n"))


def _with_dashes(name: str) -> str:
    return name.replace("_", "-")


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help=_help(__doc__),
    context_settings={"token_normalize_func": _with_dashes},
)
for command in (
    generation.demo,
    doctor.doctor,
    generation.sample_text,
    training.scan,
    training.train,
    training.calibrate,
    training.report,
    generation.generate,
    checkpoints.construct,
    checkpoints.merge,
    checkpoints.split,
):
    app.command(help=_help(command.__doc__))(command)
app.command("eval", help=_help(evaluation.evaluate.__doc__))(evaluation.evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autodeco-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show it")
    ] = False,
) -> None:
    pass


# Newer typers bring a click of their own.
_UsageError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _show_warning(message: Warning, *_, **__) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit code.

    What the user can mend is one line on standard error; the rest stays a traceback.

    Args:
        arguments: those of the process by default.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            arguments = arguments or ["--help"]
            return app(arguments, prog_name="autodeco-fast", standalone_mode=False) or 0
        except _UsageError as error:
            said = " ".join(error.format_message().split())
        except USERS as error:
            said = line(error)
    print(f"error: {said}", file=sys.stderr)
    return 2


def main() -> None:
    """Entry point of the process."""
    sys.exit(run())
