"""The steps of the demo, in order."""

import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from autodeco_fast import required_temperature
from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.demo.figure import draw
from autodeco_fast.demo.samples import continue_prompt, show, write_html
from autodeco_fast.files import output_folder, write_text
from autodeco_fast.training import base_model, evaluate
from autodeco_fast.training.stdlib_corpus import read_split

MIN_P = 0.1
GRAVITIES = (0.05, 0.1, 0.2)
FIXED = tuple(round(0.1 * k, 1) for k in range(1, 21))
WINDOW = 512
TRAIN_TOKENS, TEST_TOKENS = 3072, 1024  # of each document at most
PROMPT_TOKENS, NEW_TOKENS = 96, 96


def read_texts(text: list[Path] | None) -> tuple[list[str], list[str]]:
    """Training and held-out documents."""
    if text is None:
        return tuple(
            [content for _, content in read_split(split)] for split in ("head", "held_out")
        )
    if len(text) < 2:
        raise ValueError(
            f"text must be at least 2 files (half train the head, half test it), got {len(text)}"
        )
    contents = []
    for path in text:
        try:
            contents.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"text file {path} cannot be read: {error}") from None
        if not contents[-1].strip():
            raise ValueError(f"text file {path} holds no text")
    return contents[::2], contents[1::2]


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown, one policy a line."""
    lines = [
        "| temperature | coverage | mean T | kept tokens | nats a token |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['coverage']:.4f} | {row['temperature']:.3f} | {row['kept']:.2f} | "
            f"{row['nll']:.3f} |"
        )
    return "\n".join(lines)


def verdict(name: str, axis: str, result: tuple[float, float, float]) -> str:
    """One plain sentence."""
    difference, low, high = result
    word = "wins against" if low > 0 else "loses to" if high < 0 else "ties with"
    points = f"{100 * difference:+.2f} points of coverage, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}"
    return f"- At equal {axis}, {name} **{word}** the best fixed temperature: {points}."


def run(output: Path, text: list[Path] | None, model: str | None, seed: int) -> None:
    train_texts, test_texts = read_texts(text)
    with output_folder(output):
        _run(output, train_texts, test_texts, model, seed)


def _run(
    output: Path, train_texts: list[str], test_texts: list[str], model: str | None, seed: int
) -> None:
    console = Console()
    name = str(EMBEDDED_MODEL) if model is None else model
    tokenizer, base = base_model.load_tokenizer(name), base_model.load(name, torch.float32)
    window = base.row_length(WINDOW)
    base.verify(torch.tensor([tokenizer(train_texts[0][:500]).input_ids[:window]]))
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("base model, training text", total=len(train_texts))
        advance = partial(bar.advance, task)
        train = evaluate.collect(base, tokenizer, train_texts, window, TRAIN_TOKENS, advance)
        bar.update(
            task, description="base model, held-out text", total=len(test_texts), completed=0
        )
        test = evaluate.collect(base, tokenizer, test_texts, window, TEST_TOKENS, advance)
        bar.update(task, description="training the heads", total=len(GRAVITIES), completed=0)
        heads = {}
        for gravity in GRAVITIES:
            heads[gravity] = evaluate.fit_head(train, gravity=gravity, min_p=MIN_P, seed=seed)
            advance(1)
        with torch.inference_mode():
            predicted = {gravity: head(test.hidden) for gravity, head in heads.items()}
        policies = {f"fixed {T:.1f}": torch.full((len(test.target),), T) for T in FIXED}
        policies |= {f"head λ={gravity}": T for gravity, T in predicted.items()}
        policies["oracle T*"] = (
            required_temperature(test.stats, MIN_P).mul(1 + 1e-5).clamp(max=2.0)
        )  # past its own rounding
        bar.update(task, description="comparing temperatures", total=len(test.target), completed=0)
        sums = evaluate.per_document_means(test, base, policies, MIN_P, advance)

    rows = {name: evaluate.means(s) for name, s in sums.items()}
    fixed = [sums[f"fixed {T:.1f}"] for T in FIXED]
    sentences, comparisons = [], {}
    for gravity in GRAVITIES:
        name = f"head λ={gravity}"
        for axis, label in ((1, "mean temperature"), (2, "kept-set size")):
            comparisons[f"{name}, equal {label}"] = result = evaluate.compare(
                sums[name], fixed, axis, seed
            )
            sentences.append(verdict(name, label, result))
    curve = evaluate.v_curve(test, predicted[0.1], MIN_P)
    facts = (
        f"{len(train.target):,} training tokens; {len(test.target):,} held-out tokens of "
        f"{len(test_texts)} documents; "
        f"Min-P {MIN_P}; interval: bootstrap over documents."
    )
    markdown = "\n".join([table(rows), "", *sentences, "", facts])
    console.print(Markdown(markdown))

    new = min(NEW_TOKENS, window // 2)
    samples = continue_prompt(
        base,
        tokenizer,
        heads[0.1],
        test_texts[0],
        MIN_P,
        seed,
        min(PROMPT_TOKENS, window - new),
        new,
    )
    show(console, samples)
    report = {
        "rows": rows,
        "comparisons": comparisons,
        "v_curve": curve,
        "seed": seed,
        "min_p": MIN_P,
        "facts": facts,
    }
    write_text(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(output / "table.md", markdown + "\n")
    write_html(output / "samples.html", samples)
    draw(output / "figure.png", rows, curve, FIXED, GRAVITIES)
    heads[0.1].save_pretrained(output / "head")
    console.print(
        f"written to {output}: table.md, figure.png, samples.html, report.json, head/", markup=False
    )
