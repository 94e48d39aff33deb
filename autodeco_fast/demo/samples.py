"""One prompt, continued greedily, at T = 1 and adaptively, every token shaded by the temperature
the head gives it."""

import html
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from autodeco_fast import TemperatureHead, attach
from autodeco_fast.files import write_text
from autodeco_fast.training.base_model import BaseModel


@dataclass
class Sample:
    """A continuation: its tokens as text, and the head's temperature for each."""

    title: str
    prompt: str
    pieces: list[str]
    temperatures: list[float]


def continue_prompt(
    base: BaseModel,
    tokenizer,
    head: TemperatureHead,
    text: str,
    min_p: float,
    seed: int,
    prompt_tokens: int,
    new_tokens: int,
) -> list[Sample]:
    """Continues the beginning of `text` in the three ways."""
    model = base.model
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:prompt_tokens]])
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
    with attach(model, head, min_p=min_p):
        out["adaptive"] = model.generate(ids, seed=seed, **options)
    samples = []
    for title, tokens in out.items():
        with torch.inference_mode():
            temperatures = head(base.hidden(tokens[:, :-1])[0, ids.shape[1] - 1 :]).tolist()
        pieces = [tokenizer.decode([t]) for t in tokens[0, ids.shape[1] :].tolist()]
        samples.append(Sample(title, tokenizer.decode(ids[0]), pieces, temperatures))
    return samples


def _colour(temperature: float) -> tuple[int, int, int]:
    """White at 0 to deep orange at 2."""
    share = min(max(temperature / 2.0, 0.0), 1.0)
    return tuple(round(a + share * (b - a)) for a, b in zip((255, 255, 255), (234, 88, 12)))


def show(console: Console, samples: list[Sample]) -> None:
    """Prints the continuations with shaded backgrounds."""
    console.print("\n[bold]prompt[/bold] (from a held-out text)")
    console.print(samples[0].prompt[-300:], highlight=False, markup=False)
    for sample in samples:
        line = Text()
        for piece, temperature in zip(sample.pieces, sample.temperatures):
            line.append(piece, style=f"black on rgb({','.join(map(str, _colour(temperature)))})")
        console.print(
            f"\n[bold]{sample.title}[/bold]  (shaded by predicted temperature: white 0, orange 2)"
        )
        console.print(line, highlight=False)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Continuations shaded by predicted temperature</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}}
pre{{white-space:pre-wrap;font:14px/1.5 ui-monospace,monospace;border:1px solid #ddd;border-radius:6px;padding:1rem}}
.prompt{{color:#666}}</style>
<h1>Continuations shaded by predicted temperature</h1>
<p>White is T = 0, deep orange T = 2; point at a token for its temperature. The prompt is grey.</p>
{body}</html>
"""


def write_html(path: Path, samples: list[Sample]) -> None:
    """Writes one page with all continuations."""
    parts = []
    for sample in samples:
        spans = "".join(
            f'<span style="background:rgb{_colour(t)}" title="T = {t:.2f}">{html.escape(p)}</span>'
            for p, t in zip(sample.pieces, sample.temperatures)
        )
        prompt = f'<span class="prompt">{html.escape(sample.prompt)}</span>'
        parts.append(f"<h2>{html.escape(sample.title)}</h2><pre>{prompt}{spans}</pre>")
    write_text(path, _PAGE.format(body="\n".join(parts)))
