"""One prompt, continued greedily, at T = 1 and adaptively, with the head's temperatures."""

import torch
from rich.console import Console
from rich.text import Text

from autodeco_fast import TemperatureHead, attach
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.report_data import Passage

_PROMPT_TOKENS, _NEW_TOKENS = 96, 96
_WARM = (234, 88, 12)  # of the highest temperature; white is 0


def continue_prompt(
    base: BaseModel, tokenizer, head: TemperatureHead, *, text: str, seed: int
) -> list[Passage]:
    """Continues the beginning of `text` in the three ways."""
    model, window = base.model, base.example_length(512)
    new = min(_NEW_TOKENS, window // 2)
    prompt_tokens = min(_PROMPT_TOKENS, window - new)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:prompt_tokens]])
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new,
        "min_new_tokens": new,
    }
    torch.manual_seed(seed)
    out = {
        "greedy": model.generate(ids, do_sample=False, **options),
        "T = 1": model.generate(ids, do_sample=True, temperature=1.0, top_k=0, **options),
    }
    with attach(model, head):
        out["adaptive"] = model.generate(ids, seed=seed, **options)
    prompt = tokenizer.decode(ids[0])
    samples = []
    for title, tokens in out.items():
        hidden = base.hidden(tokens[:, :-1])[0, ids.shape[1] - 1 :]
        with torch.inference_mode():
            temperatures = head(hidden.float()).tolist()
        texts = tokenizer.batch_decode([[t] for t in tokens[0, ids.shape[1] :].tolist()])
        samples.append(Passage(list(zip(texts, temperatures)), prompt=prompt, title=title))
    return samples


def _colour(temperature: float, limit: float) -> str:
    share = min(max(temperature / limit, 0.0), 1.0)
    return ",".join(str(round(255 + share * (c - 255))) for c in _WARM)


def show(console: Console, samples: list[Passage], limit: float) -> None:
    """Prints the continuations on backgrounds that are the warmer the higher the temperature."""
    console.print("\n[bold]prompt[/bold] (from a held-out text)")
    console.print(samples[0].prompt[-300:], highlight=False, markup=False)
    for sample in samples:
        line = Text()
        for text, temperature in sample.tokens:
            line.append(text, style=f"black on rgb({_colour(temperature, limit)})")
        scale = f"shaded by predicted temperature: white 0, orange {limit:g}"
        console.print(f"\n[bold]{sample.title}[/bold]  ({scale})")
        console.print(line, highlight=False)
