"""One prompt, continued greedily, at T = 1 and adaptively, every token shaded by the temperature
the head gives it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from autodeco_fast import TemperatureHead, attach
from autodeco_fast.files import write_text
from autodeco_fast.training import report_page as html
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.shading import HOTTEST, colour, token_texts


@dataclass
class Sample:
    """A continuation: its tokens as text, and the head's temperature for each."""

    title: str
    prompt: str
    tokens: list[tuple[str, float]]


@torch.inference_mode()
def continue_prompt(
    base: BaseModel,
    tokenizer,
    head: TemperatureHead,
    prompt: list[int],
    *,
    seed: int,
    new_tokens: int,
) -> list[Sample]:
    """Continues the prompt's ids in the three ways."""
    model, ids = base.model, torch.tensor([prompt])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
    }
    torch.manual_seed(seed)
    out = {
        "greedy": model.generate(ids, do_sample=False, **options),
        "T = 1": model.generate(ids, do_sample=True, temperature=1.0, top_k=0, **options),
    }
    with attach(model, head):
        out["adaptive"] = model.generate(ids, seed=seed, **options)
    samples = []
    for title, tokens in out.items():
        hidden = base.hidden(tokens[:, :-1])[0, len(prompt) - 1 :]
        texts = token_texts(tokenizer, tokens[0, len(prompt) :].tolist())
        shades = list(zip(texts, head(hidden).tolist()))
        samples.append(Sample(title, tokenizer.decode(prompt), shades))
    return samples


def show(console: Console, samples: list[Sample]) -> None:
    """Prints the continuations with shaded backgrounds."""
    console.print("\n[bold]prompt[/bold] (from a held-out text)")
    console.print(samples[0].prompt[-300:], highlight=False, markup=False)
    for sample in samples:
        line = Text()
        for text, temperature in sample.tokens:
            line.append(text, style=f"black on {colour(temperature)}")
        shading = "shaded by predicted temperature: white 0, orange 2"
        console.print(f"\n[bold]{sample.title}[/bold]  ({shading})")
        console.print(line, highlight=False)


def write_html(path: Path, samples: list[Sample]) -> None:
    """Writes one page with all continuations."""
    legend = "White is T = 0, deep orange T = 2; point at a token for its temperature."
    body = [html.paragraph(legend)]
    for sample in samples:
        body.append(html.heading(sample.title))
        body.append(html.shaded(sample.tokens, HOTTEST, before=sample.prompt))
    write_text(path, html.page("Continuations shaded by predicted temperature", body))
