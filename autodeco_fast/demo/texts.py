"""The demo's text: what a head learns from, what it is calibrated on, what it is measured on."""

import json
from pathlib import Path

from autodeco_fast.files import write_text
from autodeco_fast.training.stdlib_corpus import read_split

PASSAGE = 3000  # characters: what fits into the context of the embedded model
# Passages in all, as far as the documents have so many: one of each at least, as many of each.
_LEARNED, _HELD_OUT = 96, 48


def read_texts(paths: list[Path] | None) -> tuple[list[str], list[str]]:
    """Documents to learn from and held-out ones.

    Raises:
        ValueError: for files that cannot be read as text, or fewer than two of them.
    """
    if paths is None:
        learned, held_out = (
            [content for _, content in read_split(split)] for split in ("head", "held_out")
        )
        return learned, held_out
    if len(paths) < 2:
        raise ValueError(
            f"text must be at least 2 files (half train the head, half test it), got {len(paths)}"
        )
    contents = [_read(Path(path)) for path in paths]
    return contents[::2], contents[1::2]


def _read(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text file {path} cannot be read: {error}") from None
    if not content.strip():
        raise ValueError(f"text file {path} holds no text")
    return content


def _passages(documents: list[str], wanted: int) -> list[str]:
    """The first passages of every document."""
    count = max(1, wanted // len(documents))
    cut = [
        document[at : at + PASSAGE]
        for document in documents
        for at in range(0, min(len(document), count * PASSAGE), PASSAGE)
    ]
    return [passage for passage in cut if passage.strip()]


def write_examples(folder: Path, learned: list[str], held_out: list[str]) -> dict[str, Path]:
    """A JSONL file of passages for training, for calibration and for the report.

    Calibration takes every third held-out passage; one alone serves for both.
    """
    passages = _passages(held_out, _HELD_OUT)
    examples = {
        "training": _passages(learned, _LEARNED),
        "calibration": passages[::3],
        "held-out": [text for i, text in enumerate(passages) if i % 3] or passages,
    }
    paths = {}
    for name, texts in examples.items():
        paths[name] = folder / f"{name}.jsonl"
        write_text(paths[name], "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths
