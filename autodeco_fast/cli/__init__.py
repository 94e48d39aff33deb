"""The `autodeco-fast` command. Bad input is one line on standard error and exit code 2, before any
model is loaded."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast import __version__
from autodeco_fast.cli import training
from autodeco_fast.errors import USERS, line
from autodeco_fast.values import SEEDS, require
from autodeco_fast.values import text as check_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
training.register(app)
Seed = typer.Option(min=SEEDS[0], max=SEEDS[1], help="fixes the output")


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


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="folder for the table, the figure and the samples")
    ] = Path("demo-output"),
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 files to use instead of the standard library")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder or hub id instead of the embedded model")
    ] = None,
    seed: Annotated[int, Seed] = 0,
) -> None:
    """Train heads on a small model, compare them with fixed temperatures, draw and generate."""
    from autodeco_fast.demo import run_demo

    run_demo(output=output, text=text, model=model, seed=seed)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="folder or hub id of a causal language model")],
    head: Annotated[str, typer.Option(help="folder or hub id of a temperature head")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    min_p: Annotated[
        float | None, typer.Option(help="the cut, in (0, 1]; by default the head's own")
    ] = None,
    seed: Annotated[int | None, Seed] = None,
) -> None:
    """Continue a prompt with a predicted temperature per token."""
    if min_p is not None:
        require(0 < min_p <= 1, "min_p", min_p, "in (0, 1]")
    check_text("prompt", prompt)
    from autodeco_fast import TemperatureHead

    loaded = TemperatureHead.from_pretrained(head)
    from autodeco_fast.training.base_model import facts, load_causal_lm, load_tokenizer, width

    found, H, tokenizer = facts(model), width(model), load_tokenizer(model)
    if loaded.hidden_size != H:
        raise ValueError(
            f"head has width {loaded.hidden_size}, the model's output embedding takes {H}"
        )
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    if not ids.numel():
        raise ValueError(f"prompt must hold a token of the model, got {prompt!r}")
    if found.vocabulary and ids.max() >= found.vocabulary:
        raise ValueError(
            f"the tokenizer makes id {ids.max()} of the prompt, the model's vocabulary has "
            f"{found.vocabulary}"
        )
    if found.positions and ids.shape[1] + max_new_tokens > found.positions:
        asked = f"{ids.shape[1]} tokens of the prompt and max_new_tokens {max_new_tokens}"
        raise ValueError(f"the model has {found.positions} positions, got {asked}")
    from transformers import TextStreamer

    from autodeco_fast import attach

    base = load_causal_lm(model).eval()
    with attach(base, loaded, min_p=min_p):
        base.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer),
            seed=seed,
        )


@app.command()
def doctor() -> None:
    """Show versions and devices, say which backend each op will use, and test every op."""
    import torch

    from autodeco_fast.cli.doctor import self_test, versions, why

    for name, version in versions().items():
        typer.echo(f"{name:14} {version}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    failed = False
    for device in devices:
        name = (
            torch.cuda.get_device_name()
            if device == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        typer.echo(f"\n{device} ({name}): backend {why(device)}")
        for op, good in self_test(device).items():
            typer.echo(f"  {op:26} {'ok' if good else 'FAILED'}")
            failed |= not good
    if failed:
        raise typer.Exit(1)


# Newer typers bring a click of their own.
_UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _show_warning(message: Warning, *_, **__) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(arguments: list[str] | None = None) -> int:
    """Runs a command; the exit code. What the user can mend is one line on standard error; the rest
    stays a traceback.

    Args:
        arguments: those of the process by default.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return (
                app(arguments or ["--help"], prog_name="autodeco-fast", standalone_mode=False) or 0
            )
        except _UsageError as error:
            said = " ".join(error.format_message().split())
        except USERS as error:
            said = line(error)
    print(f"error: {said}", file=sys.stderr)
    return 2


def main() -> None:
    """Entry point of the process."""
    sys.exit(run())
