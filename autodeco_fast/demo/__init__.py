"""The demo: scan, train, calibrate, report and generate, on a model that ships with the package."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "model"


def run_demo(
    *, output: Path, text: list[Path] | None = None, model: str | None = None, seed: int = 0
) -> None:
    """Runs what the commands run, one after the other, and leaves their folders in `output`:
    scans, `head/`, `report/` and `samples.html`.

    Args:
        output: folder, made if missing; what an earlier demo left there is replaced.
        text: UTF-8 files, every second one for training the head and the others for calibration
            and the report; the standard library's source by default.
        model: folder or hub id of a causal language model; the embedded one by default.
        seed: of the head's training and the samples.

    Raises:
        ValueError: for files that cannot be read as text, or fewer than two of them; for an output
            that cannot be written or a model that cannot be loaded, before any work.
    """
    from autodeco_fast.demo.run import run

    run(Path(output), text=text, model=model, seed=seed)
