"""The demo: trains heads on the embedded model, compares them with fixed temperatures, draws and
generates."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "model"


def run_demo(
    *, output: Path, text: list[Path] | None = None, model: str | None = None, seed: int = 0
) -> None:
    """Runs the demo and writes `report.json`, `table.md`, `figure.png` and `samples.html` to
    `output`.

    Args:
        output: folder, made if missing.
        text: UTF-8 files, every second one for training the heads and the others for the
            comparison; the standard library's source by default.
        model: folder or hub id of a causal language model; the embedded one by default.
        seed: of the heads' training, the bootstrap and the samples.

    Raises:
        ValueError: for files that cannot be read as text, or fewer than two of them; for an output
            that cannot be written or a model that cannot be loaded, before any work.
    """
    from autodeco_fast.demo.run import run

    run(Path(output), text, model, seed)
