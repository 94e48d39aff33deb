"""The demo on any model and text: scan, train, calibrate, report and generate, in order; each step
is what a command does."""

import json
import shlex
from pathlib import Path

import torch
from rich.console import Console

from autodeco_fast.demo import EMBEDDED_MODEL
from autodeco_fast.demo.folder import begin, say
from autodeco_fast.demo.samples import draw, show, write_html
from autodeco_fast.files import output_folder, write_text
from autodeco_fast.training import base_model
from autodeco_fast.training.calibrate import calibrate_from_files
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.report import PAGE, report_from_files
from autodeco_fast.training.run import scan_from_files, train_from_files
from autodeco_fast.training.stdlib_corpus import read_split

MIN_P, GRAVITY, ALPHA, EPOCHS = 0.02, 0.1, 0.1, 10
# Characters of each document at most; of about four a token. Training text is cut into examples.
TRAIN_CHARACTERS, EXAMPLE_CHARACTERS, HELD_OUT_CHARACTERS = 4_000, 1_800, 2_400
HELD_OUT_TOKENS = 1024
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


def _examples(text: str) -> list[str]:
    """The beginning of a document, cut where lines end."""
    examples = [""]
    for line in text[:TRAIN_CHARACTERS].splitlines(keepends=True):
        if examples[-1] and len(examples[-1]) + len(line) > EXAMPLE_CHARACTERS:
            examples.append("")
        examples[-1] += line
    return examples


def _write_jsonl(path: Path, texts: list[str]) -> str:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    write_text(path, "".join(lines))
    return str(path)


def run(output: Path, *, text: list[Path] | None, model: str | None, seed: int) -> None:
    train_texts, held_texts = read_texts(text)
    name = str(EMBEDDED_MODEL) if model is None else model
    base_model.facts(name)  # is there such a model?
    with output_folder(output):
        settings = {"model": name, "seed": seed, "min_p": MIN_P, "gravity": GRAVITY, "alpha": ALPHA}
        begin(output, settings)
        (output / "texts").mkdir()
        _train(output, name, train_texts, seed=seed)
        _evaluate(output, name, held_texts)
        _generate(output, name, held_texts[0], seed=seed)


def _train(output: Path, model: str, texts: list[str], *, seed: int) -> None:
    """`autodeco-fast scan`, `autodeco-fast train`."""
    examples = [example for text in texts for example in _examples(text)]
    data = _write_jsonl(output / "texts/train.jsonl", examples)
    say("scan: the frozen model runs over the training text once")
    scan = output / "scans/train"
    scan_from_files(ScanConfig(model=model, data=data, output=scan, seed=seed))
    say("train: a head learns the lowest temperatures that lose a tenth of the reachable tokens")
    settings = TrainConfig(
        output=output / "head",
        scan=scan,
        min_p=MIN_P,
        gravity=GRAVITY,
        num_train_epochs=EPOCHS,
        seed=seed,
    )
    train_from_files(settings)


def _evaluate(output: Path, model: str, texts: list[str]) -> None:
    """`autodeco-fast calibrate` on every second held-out document, `report` on the others."""
    texts = [text[:HELD_OUT_CHARACTERS] for text in texts]
    scans = {"held-out": texts[::2], "calibration": texts[1::2]}
    for name, documents in scans.items():
        if not documents:
            continue
        use = "the report" if name == "held-out" else name
        say(f"scan: held-out text for {use}")
        config = ScanConfig(
            model=model,
            data=_write_jsonl(output / f"texts/{name}.jsonl", documents),
            output=output / "scans" / name,
            all_tokens=True,
            max_length=HELD_OUT_TOKENS,
        )
        scan_from_files(config)
    if scans["calibration"]:
        say("calibrate: one number, added to every temperature, makes it a promise")
        try:
            calibrate_from_files(output / "head", output / "scans/calibration", alpha=ALPHA)
        except ValueError as error:  # out of reach: the head stays as it was trained
            say(f"not calibrated: {error}")
    say("report: what the head does on text that neither training nor calibration saw")
    report_from_files(
        output / "head", [output / "scans/held-out"], output / "report", model=model, min_p=None
    )


def _generate(output: Path, model: str, text: str, *, seed: int) -> None:
    """A prompt, continued in three ways."""
    say("generate: the same prompt greedily, at T = 1 and adaptively")
    tokenizer, base = base_model.load_tokenizer(model), base_model.load(model, torch.float32)
    window = base.example_length(PROMPT_TOKENS + NEW_TOKENS)
    new = min(NEW_TOKENS, window // 2)
    ways = {
        "greedy": "greedy",
        "T = 1": "static T=1",
        "adaptive": f"head={shlex.quote(str(output / 'head'))}",
    }
    ids = tokenizer(text, add_special_tokens=False).input_ids[: min(PROMPT_TOKENS, window - new)]
    samples = draw(base, tokenizer, ways, ids, samples=1, new_tokens=new, seed=seed)
    console = Console()
    show(console, samples)
    write_html(output / "samples.html", samples)
    written = f"written to {output}: report/{PAGE}, samples.html, head/"
    console.print(f"\n{written}", markup=False, soft_wrap=True)
