"""The demo: the commands one after another, on the embedded model and the standard library."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "model"


def run_demo(
    *, output: Path, text: list[Path] | None = None, model: str | None = None, seed: int = 0
) -> None:
    """Scans text, trains a head, calibrates it, continues a prompt and reports.

    Leaves the head in `output/head`, the report in `output/report`, and what they were made from
    in `output/text` and `output/scans`. What an earlier demo left there is replaced.

    Args:
        output: folder, made if missing.
        text: UTF-8 files, every second one for training the head and the others held out; the
            standard library's source by default.
        model: folder or hub id of a causal language model; the embedded one by default.
        seed: of the head's training and the samples.

    Raises:
        ValueError: for files that cannot be read as text, or fewer than two of them; for an output
            that cannot be written or a model that cannot be loaded, before any work; for text that
            holds nothing to learn from.
    """
    from autodeco_fast.demo.run import run

    model = str(EMBEDDED_MODEL) if model is None else model
    run(Path(output), text=text, model=model, seed=seed)
