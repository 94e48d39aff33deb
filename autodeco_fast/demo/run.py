"""The steps of the demo, in order; each is what a command does, and the command is printed."""

import shlex
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from autodeco_fast import TemperatureHead
from autodeco_fast.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from autodeco_fast.demo.samples import continue_prompt, show
from autodeco_fast.demo.texts import read_texts, write_examples
from autodeco_fast.files import output_folder
from autodeco_fast.training import base_model
from autodeco_fast.training.calibrate import calibrate_from_files
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.file_names import CALIBRATION_NAME, METRICS_NAME, SETTINGS_NAME
from autodeco_fast.training.report import PAGE, report_from_files
from autodeco_fast.training.report_data import Passage
from autodeco_fast.training.run import scan_from_files, train_from_files
from autodeco_fast.training.scan_store import MANIFEST

# At more than Min-P 0.02, few temperatures reach enough tokens of so small a model.
MIN_P, ALPHA = 0.02, 0.25
_SCANS = ("training", "calibration", "held-out")
# Of every token, so that λ is a share of all of them.
_TRAINING = {
    "min_p": MIN_P,
    "gravity": ALPHA,
    "num_train_epochs": 4,
    "learning_rate": 2e-3,
    "max_rank": 2**31 - 1,
    "easy_fraction": 1.0,
}
_WRITTEN = (
    "text/*.jsonl",
    *(f"scans/{name}/{file}" for name in _SCANS for file in (MANIFEST, "shard-*.safetensors")),
    *(f"head/{name}" for name in (CONFIG_NAME, WEIGHTS_NAME, SETTINGS_NAME, METRICS_NAME)),
    f"head/{CALIBRATION_NAME}",
)


def run(output: Path, *, text: list[Path] | None, model: str, seed: int) -> None:
    learned, held_out = read_texts(text)
    console = Console()
    with output_folder(output):
        base = base_model.load(model, base_model.frozen_dtype("cpu"))
        tokenizer = base_model.load_tokenizer(model)
        _forget(output)
        try:
            data = write_examples(output / "text", learned, held_out)
            scans = {name: output / "scans" / name for name in _SCANS}
            for name, folder in scans.items():
                _scan(console, model, data[name], folder)
            _train(console, scans, output / "head", seed)
            head = TemperatureHead.from_pretrained(output / "head")
            samples = continue_prompt(base, tokenizer, head, text=held_out[0], seed=seed)
            show(console, samples, head.max_temperature)
            _report(console, output, scans["held-out"], samples)
        except BaseException:
            _forget(output)
            raise


def _forget(output: Path) -> None:
    """Removes what a demo wrote before its report, and nothing else."""
    folders = set()
    for path in [path for pattern in _WRITTEN for path in output.glob(pattern)]:
        folders |= {path.parent, path.parent.parent} - {output}
        path.unlink()
    for folder in sorted(folders, reverse=True):
        with suppress(OSError):  # something of somebody else's is in it
            folder.rmdir()


def _scan(console: Console, model: str, data: Path, folder: Path) -> None:
    options = {"model": model, "data": str(data), "output": folder, "all_tokens": True}
    _announce(console, "scan", options)
    scan_from_files(ScanConfig(**options))


def _train(console: Console, scans: dict[str, Path], folder: Path, seed: int) -> None:
    """Trains the head and calibrates it, if that is possible."""
    options = {"scan": scans["training"], "output": folder, **_TRAINING, "seed": seed}
    _announce(console, "train", options)
    train_from_files(TrainConfig(**options))
    options = {"head": folder, "scan": scans["calibration"], "alpha": ALPHA}
    _announce(console, "calibrate", options)
    try:
        calibrate_from_files(folder, scans["calibration"], alpha=ALPHA)
    except ValueError as error:  # no temperature reaches so many tokens of this text
        console.print(f"the head stays as it was trained: {error}", markup=False, soft_wrap=True)


def _report(console: Console, output: Path, scan: Path, samples: list[Passage]) -> None:
    options = {"head": output / "head", "scan": scan, "output": output / "report"}
    _announce(console, "report", options)
    report_from_files(output / "head", [scan], output / "report", samples=samples)
    page = output / "report" / PAGE
    console.print(f"written to {output}: head/, scans/, text/, {page}", markup=False)


def _announce(console: Console, name: str, options: dict) -> None:
    """The command that does what comes next."""
    flags = []
    for option, value in options.items():
        flag = f"--{option.replace('_', '-')}"
        flags.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    line = " ".join(["\n$ autodeco-fast", name, *flags])
    console.print(line, markup=False, highlight=False, soft_wrap=True)
