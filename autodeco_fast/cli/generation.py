"""The commands that generate: a prompt's continuation, and the demo."""

from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast.cli.signature import takes
from autodeco_fast.training.sample_text import SampleTextConfig
from autodeco_fast.values import SEEDS, require
from autodeco_fast.values import text as check_text

Seed = typer.Option(min=SEEDS[0], max=SEEDS[1], help="fixes the output")


def demo(
    output: Annotated[
        Path, typer.Option(help="folder for the scans, the head, the report and the samples")
    ] = Path("demo-output"),
    text: Annotated[
        list[Path] | None, typer.Option(help="UTF-8 files to use instead of the standard library")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder or hub id instead of the embedded model")
    ] = None,
    seed: Annotated[int, Seed] = 0,
) -> None:
    """Scan, train, calibrate, report and generate, on a small model that is there already."""
    from autodeco_fast.demo import run_demo

    run_demo(output=output, text=text, model=model, seed=seed)


def generate(
    model: Annotated[str, typer.Option(help="folder or hub id of a causal language model")],
    head: Annotated[str, typer.Option(help="folder or hub id of a temperature head")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens after the prompt")] = 64,
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
    tokenizer, inputs = _inputs(model, loaded.hidden_size, prompt, max_new_tokens)
    import torch
    from transformers import TextStreamer

    from autodeco_fast import attach
    from autodeco_fast.training.base_model import load_causal_lm, wrap
    from autodeco_fast.training.head_folder import check_model, training_settings
    from autodeco_fast.training.scan import lm_head_fingerprint

    base = load_causal_lm(model).eval()
    if training_settings(Path(head)):
        check_model(Path(head), lm_head_fingerprint(wrap(base)))
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    with attach(base, loaded, min_p=min_p):
        base.generate(
            input_ids=inputs["input_ids"].to(base.device),
            attention_mask=inputs["attention_mask"].to(base.device),
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer),
            seed=seed,
        )


@takes(SampleTextConfig)
def sample_text(**values: object) -> None:
    """Draw a model's own text, to train a head on without anybody's data."""
    config = SampleTextConfig(**values)
    from autodeco_fast.training import sample_text

    sample_text.sample_text(config)


def _inputs(model: str, head_width: int, prompt: str, max_new_tokens: int) -> tuple:
    """The model's tokenizer and the prompt's ids.

    Raises:
        ValueError: if head, prompt and model do not fit each other; the weights are not loaded yet.
    """
    from autodeco_fast.training.base_model import facts, load_tokenizer, width

    found, H, tokenizer = facts(model), width(model), load_tokenizer(model)
    if head_width != H:
        raise ValueError(f"head has width {head_width}, the model's output embedding takes {H}")
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
    return tokenizer, inputs
