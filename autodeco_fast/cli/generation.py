"""The commands that generate: a prompt's continuation, and the demo."""

from pathlib import Path
from typing import Annotated

import typer

from autodeco_fast.cli.signature import takes
from autodeco_fast.errors import foreign
from autodeco_fast.training.sample_text import SampleTextConfig
from autodeco_fast.values import SEEDS, require
from autodeco_fast.values import text as check_text


def _seed(value: int | None) -> int | None:
    """Checked here: typer would write the whole range in the help."""
    if value is not None and not SEEDS[0] <= value <= SEEDS[1]:
        raise typer.BadParameter(f"{value} is not in [{SEEDS[0]}, {SEEDS[1]}].")
    return value


Seed = typer.Option(callback=_seed, help="fixes the output")


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
    head: Annotated[
        str,
        typer.Option(
            help="folder or hub id of a temperature head, with AutoDeco's top-p head in it or not, "
            "or of an AutoDeco checkpoint"
        ),
    ],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="tokens after the prompt")] = 64,
    min_p: Annotated[
        float | None,
        typer.Option(help="the cut, in (0, 1]; by default the head's own, with two heads none"),
    ] = None,
    scale: Annotated[float, typer.Option(help="factor on T; must be positive")] = 1.0,
    t_min: Annotated[float, typer.Option(help="lowest T, after the factor; must be ≥ 0")] = 0.0,
    t_max: Annotated[
        float | None, typer.Option(help="highest T, likewise; by default the head's")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="ask: the prompt is a user's message, not text to go on")
    ] = False,
    seed: Annotated[int | None, Seed] = None,
) -> None:
    """Continue a prompt, or answer it, with a predicted temperature per token."""
    if min_p is not None:
        require(0 < min_p <= 1, "min_p", min_p, "in (0, 1]")
    check_text("prompt", prompt)
    from autodeco_fast.policies.folder import load_policy

    cut = {} if min_p is None else {"min_p": min_p}
    policy = load_policy(head, scale=scale, t_min=t_min, t_max=t_max, **cut)
    tokenizer, inputs = _inputs(model, policy.hidden_size, prompt, max_new_tokens, chat=chat)
    import torch
    from transformers import TextStreamer

    from autodeco_fast import attach
    from autodeco_fast.training.base_model import load_causal_lm, wrap
    from autodeco_fast.training.head_folder import check_model
    from autodeco_fast.training.scan import lm_head_fingerprint

    base = load_causal_lm(model).eval()
    check_model(head, lambda: lm_head_fingerprint(wrap(base)))
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    with attach(base, policy):
        base.generate(
            input_ids=inputs["input_ids"].to(base.device),
            attention_mask=inputs["attention_mask"].to(base.device),
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
            seed=seed,
        )


@takes(SampleTextConfig)
def sample_text(**values: object) -> None:
    """Draw a model's own text, to train a head on without anybody's data."""
    config = SampleTextConfig(**values)
    from autodeco_fast.training import sample_text

    sample_text.sample_text(config)


def _inputs(model: str, head_width: int, prompt: str, max_new_tokens: int, *, chat: bool) -> tuple:
    """The model's tokenizer and the prompt's ids, through the chat template if it is a message.

    Raises:
        ValueError: if head, prompt and model do not fit each other; the weights are not loaded yet.
    """
    from autodeco_fast.training.base_model import facts, load_tokenizer, width

    found, H, tokenizer = facts(model), width(model), load_tokenizer(model)
    if head_width != H:
        raise ValueError(f"head has width {head_width}, the model's output embedding takes {H}")
    inputs = _as_chat(tokenizer, prompt) if chat else tokenizer(prompt, return_tensors="pt")
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


def _as_chat(tokenizer, prompt: str) -> dict:
    """What the tokenizer makes of a user's message and the begin of an answer.

    Raises:
        ValueError: if it has no chat template, or one that does not take the message.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat needs a chat template, which the model's tokenizer has not")
    with foreign("the tokenizer's chat template does not take the prompt"):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
