"""The demo: on SmolLM2-135M-Instruct, where the package that carries it is installed; else, or with
a text or a model of one's own, on the small model that ships with this package."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "model"


def run_demo(
    *, output: Path, text: list[Path] | None = None, model: str | None = None, seed: int = 0
) -> None:
    """Runs what the commands run, one after the other, and leaves their folders in `output`.

    On SmolLM2, with the head that ships for it: samples of a prompt (`samples.html`), an evaluation
    beside fixed settings (`evaluation/`), a few rounds of training on rewards (`head/`). Else scan,
    train, calibrate, report and generate: scans, `head/`, `report/` and `samples.html`.

    Args:
        output: folder, made if missing; what an earlier demo left there is replaced.
        text: UTF-8 files, every second one for training a head and the others for calibration and
            the report; the standard library's source by default.
        model: folder or hub id of a causal language model that a head is trained for.
        seed: of the head's training and the samples.

    Raises:
        ValueError: for files that cannot be read as text, or fewer than two of them; for an output
            that cannot be written or a model that cannot be loaded, before any work.
    """
    from autodeco_fast.demo import compare, pipeline, smollm2
    from autodeco_fast.demo.folder import say

    if text is None and model is None:
        if compare.ready():
            return compare.run(Path(output), seed=seed)
        say(
            f"{smollm2.NAME} is not here ({smollm2.INSTALL}): the demo takes the small model of "
            "Python source text that ships with this package"
        )
    pipeline.run(Path(output), text=text, model=model, seed=seed)
