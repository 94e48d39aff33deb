"""One prompt under several policies, every token shaded by the temperature it was drawn at."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from autodeco_fast import attach, policies
from autodeco_fast.files import write_text
from autodeco_fast.training import report_page as html
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.shading import HOTTEST, colour, token_texts


@dataclass
class Sample:
    """Continuations under a policy: their tokens as text, and the temperature of each."""

    title: str
    prompt: str
    continuations: list[list[tuple[str, float]]]


@torch.inference_mode()
def draw(
    base: BaseModel,
    tokenizer,
    by_title: dict[str, str],
    prompt: list[int],
    *,
    samples: int,
    new_tokens: int,
    seed: int,
    first_line: bool = False,
) -> list[Sample]:
    """Continues the prompt's ids under policies, title → text; one that is greedy only once.

    Args:
        first_line: whether what follows a line's end is left out.
    """
    model, ids = base.model, torch.tensor([prompt])
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    found = []
    for title, text in by_title.items():
        with attach(model, policies.parse(text), record=True) as attachment:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                num_return_sequences=1 if text == "greedy" else samples,
                pad_token_id=min(ends, default=0),
                seed=seed,
            )
            T = torch.stack([record.temperature for record in attachment.records], 1)
        continuations = []
        for tokens, temperatures in zip(out[:, len(prompt) :].tolist(), T.tolist()):
            n = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            texts = token_texts(tokenizer, tokens[:n])
            if first_line:
                n = next((i for i, text in enumerate(texts) if "\n" in text), n)
            continuations.append(list(zip(texts[:n], temperatures)))
        found.append(Sample(title, tokenizer.decode(prompt), continuations))
    return found


def show(console: Console, samples: list[Sample]) -> None:
    """Prints the continuations with shaded backgrounds."""
    console.print("\n[bold]prompt[/bold]")
    console.print(samples[0].prompt[-300:], highlight=False, markup=False)
    console.print("\nTokens are shaded by temperature: white 0, orange 2.")
    for sample in samples:
        console.print(f"\n[bold]{sample.title}[/bold]")
        for tokens in sample.continuations:
            line = Text("· ")
            for text, temperature in tokens:
                line.append(text, style=f"black on {colour(temperature)}")
            console.print(line, highlight=False)


def write_html(path: Path, samples: list[Sample]) -> None:
    """Writes one page with all continuations."""
    legend = "White is T = 0, deep orange T = 2; point at a token for its temperature."
    body = [html.paragraph(legend)]
    for sample in samples:
        body.append(html.heading(sample.title))
        body += [html.shaded(tokens, HOTTEST) for tokens in sample.continuations]
    body[1:1] = [html.heading("Prompt"), html.shaded([], HOTTEST, before=samples[0].prompt)]
    write_text(path, html.page("Continuations shaded by temperature", body))
