"""The `autodeco-fast` command. Bad input is one line on standard error and exit code 2, before any model is loaded."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast import _cli_training

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
_cli_training.register(app)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for the table, the figure and the samples")] = Path("demo-output"),
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 files to use instead of the standard library")] = None,
    model: Annotated[str | None, typer.Option(help="folder or hub id instead of the embedded model")] = None,
    seed: Annotated[int, typer.Option(help="of training, bootstrap and samples")] = 0,
) -> None:
    """Train heads on a small model, compare them with fixed temperatures, draw and generate."""
    from autodeco_fast.demo import run_demo

    run_demo(output=output, text=text, model=model, seed=seed)


def _model_width(model: str) -> int:
    """Width of the output embedding, from the configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"model must be a folder or a hub id, got {model!r}: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        output = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    return output.weight.shape[1]


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="folder or hub id of a causal language model")],
    head: Annotated[str, typer.Option(help="folder or hub id of a temperature head")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    min_p: Annotated[float, typer.Option(help="the cut, in (0, 1]")] = 0.1,
    seed: Annotated[int | None, typer.Option(help="fixes the output")] = None,
) -> None:
    """Continue a prompt with a predicted temperature per token."""
    if not 0 < min_p <= 1:
        raise ValueError(f"min_p must be in (0, 1], got {min_p}")
    from autodeco_fast import TemperatureHead, attach

    loaded = TemperatureHead.from_pretrained(head)
    width = _model_width(model)
    if loaded.hidden_size != width:
        raise ValueError(f"head has width {loaded.hidden_size}, the model's output embedding takes {width}")
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    with attach(base, loaded, min_p=min_p):
        base.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer),
            seed=seed,
        )


@app.command()
def doctor() -> None:
    """Show versions and devices, say which backend each op will use, and test every op."""
    import torch

    from autodeco_fast.doctor import self_test, versions, why

    for name, version in versions().items():
        typer.echo(f"{name:14} {version}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    failed = False
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        typer.echo(f"\n{device} ({name}): backend {why(device)}")
        for op, good in self_test(device).items():
            typer.echo(f"  {op:26} {'ok' if good else 'FAILED'}")
            failed |= not good
    if failed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a ValueError is the user's to read, on one line."""
    try:
        app()
    except ValueError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
