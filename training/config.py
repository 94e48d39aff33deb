"""Settings of a scan and of a training run, checked when made. Imports nothing heavy: the command
line shows the defaults."""

import types
import typing
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from autodeco_fast.errors import foreign
from autodeco_fast.values import SEEDS, finite, inner_share, require, whole

OBJECTIVES = ("min_p_hinge", "autodeco_temperature", "autodeco_joint")
SCHEDULES = ("cosine", "constant")
_LARGEST = 2**63 - 1
_LARGEST_FLOAT = 1e30  # products with it stay finite in single precision
_SIZES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_KINDS = {bool: "true or false", str: "text", Path: "a path"}


def size(text: str) -> int:
    """Bytes: a number, or one with k, M, G or T."""
    number, factor = (text[:-1], _SIZES[text[-1]]) if text[-1:] in _SIZES else (text, 1)
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):  # not a number; infinite
        raise ValueError(
            f"a size must be a number of bytes like 500M or 2G, got {text!r}"
        ) from None


def _kinds(field) -> tuple[type, bool]:
    """The type of a setting, and whether it may be None."""
    kinds = typing.get_args(field.type) or (field.type,)
    return kinds[0], types.NoneType in kinds


def _check_types(settings) -> None:
    """Every integer an integer of 64 bits, every float finite, everything else what it says;
    numbers become Python's.

    Raises:
        ValueError: naming the setting.
    """
    for field in fields(settings):
        name, value = field.name, getattr(settings, field.name)
        kind, optional = _kinds(field)
        if value is None and optional:
            continue
        if kind is int:
            value = whole(name, value, *(SEEDS if name == "seed" else (-_LARGEST - 1, _LARGEST)))
        elif kind is float:
            value = finite(name, value)
            require(abs(value) <= _LARGEST_FLOAT, name, value, f"at most {_LARGEST_FLOAT:g}")
        else:
            require(isinstance(value, kind), name, value, _KINDS[kind])
        object.__setattr__(settings, name, value)


def _selection(settings) -> None:
    _check_types(settings)
    require(settings.max_rank >= 0, "max_rank", settings.max_rank, "≥ 0")
    require(settings.max_length >= 2, "max_length", settings.max_length, "at least 2")
    for name in ("trivial_prob", "easy_fraction"):
        require(0 <= getattr(settings, name) <= 1, name, getattr(settings, name), "in [0, 1]")


@dataclass(frozen=True)
class ScanConfig:
    """What a scan writes down of a model's predictions on some data.

    Args:
        model: folder or hub id of a causal language model; it stays frozen, in bf16 and eval mode.
        data: a JSONL file (see `training/data.py` for its rows), or a name for `datasets`.
        output: folder for the scan; one that was begun with the same settings is continued.
        split: of a dataset that is named.
        max_length: tokens of a row at most, and never more than the model has positions; what is
            beyond is cut off.
        batch_tokens: tokens of a forward pass, padding included.
        rows_per_shard: rows whose tokens share a file; what is lost, at most, when a scan is
            killed.
        max_bytes: of all shards together; a random part of the tokens is kept where it is exceeded.
            0: no limit.
        all_tokens: keep every token instead of a selection by difficulty: to calibrate and to
            report on.
        max_rank, trivial_prob, easy_fraction: which tokens to keep, see `goldilocks_mask`.
        seed: of what is kept.
    """

    model: str
    data: str
    output: Path
    split: str = "train"
    max_length: int = 1024
    batch_tokens: int = 8192
    rows_per_shard: int = 256
    max_bytes: int = 0
    all_tokens: bool = False
    max_rank: int = 100
    trivial_prob: float = 0.9
    easy_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self):
        _selection(self)
        require(self.max_bytes >= 0, "max_bytes", self.max_bytes, "≥ 0")
        for name in ("batch_tokens", "rows_per_shard"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """How a head is trained. Names follow transformers' `TrainingArguments` where it has them.

    Args:
        output: folder for the head, `metrics.jsonl` and checkpoints; must not hold a head yet.
        scan: folder of a scan; then neither model nor data is needed.
        model: folder or hub id of a causal language model; it stays frozen, in bf16 and eval mode.
        data: a JSONL file; see `training/data.py` for its rows.
        objective: min_p_hinge; or, with a model and data, autodeco_temperature or autodeco_joint.
        min_p: of the cut the head will be used with, in (0, 1).
        gravity: λ, the share of reference tokens allowed to fall outside the cut, ≥ 0.
        power: of the hinge, 1 or 2.
        max_length: tokens of a row at most, and never more than the model has positions; what is
            beyond is cut off.
        num_train_epochs: passes over the data.
        max_steps: stop after this many optimizer steps; 0 for no limit.
        per_device_train_batch_size: rows a process runs at once.
        gradient_accumulation_steps: such batches a process adds up before a step.
        batch_tokens: tokens a process takes from a scan in a step.
        learning_rate: AdamW's, at the end of the warm-up.
        lr_scheduler_type: cosine (to zero) or constant, after the warm-up.
        warmup_ratio: share of the steps that warm up.
        max_rank, trivial_prob, easy_fraction: which tokens to learn from, see `goldilocks_mask`; a
            scan's tokens are selected already, and are all taken unless these say less.
        eval_fraction: share of the documents held out to measure the loss on; 0 for none.
        eval_steps: steps between such measurements.
        early_stopping_patience: measurements without a better loss after which training stops, the
            best head is kept; 0: never.
        save_steps: steps between checkpoints; 0 for none.
        save_total_limit: newest checkpoints that are kept.
        max_memory: bytes that a scan's tokens may take in a process, besides what training itself
            takes; 0 for no limit.
        diagnostics: tokens a step of which `diagnostics.jsonl` records T, T* and whether the cut
            held; 0 for none.
        report_to: trackers of accelerate (tensorboard, wandb …), separated by commas; "none".
        resume: continue from the newest checkpoint in `output`.
        seed: of the head's weights, the order of the data and the choice of trivial tokens.

    Raises:
        ValueError: for a value out of range, one line.
    """

    output: Path
    scan: Path | None = None
    model: str | None = None
    data: Path | None = None
    objective: str = "min_p_hinge"
    min_p: float = 0.1
    gravity: float = 0.1
    power: int = 1
    max_length: int = 1024
    num_train_epochs: int = 1
    max_steps: int = 0
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    batch_tokens: int = 2048
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.05
    max_rank: int = 100
    trivial_prob: float = 0.9
    easy_fraction: float = 0.1
    eval_fraction: float = 0.0
    eval_steps: int = 50
    early_stopping_patience: int = 0
    save_steps: int = 0
    save_total_limit: int = 2
    max_memory: int = 0
    diagnostics: int = 0
    report_to: str = "none"
    resume: bool = False
    seed: int = 0

    def __post_init__(self):
        _selection(self)
        inner_share("min_p", self.min_p)
        require(self.gravity >= 0, "gravity", self.gravity, "≥ 0")
        require(self.power in (1, 2), "power", self.power, "1 or 2")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "positive")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "in [0, 1]")
        require(0 <= self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "in [0, 1)")
        for name, choices in (("objective", OBJECTIVES), ("lr_scheduler_type", SCHEDULES)):
            require(
                getattr(self, name) in choices,
                name,
                getattr(self, name),
                "one of " + ", ".join(choices),
            )
        for name in (
            "max_steps",
            "early_stopping_patience",
            "save_steps",
            "max_memory",
            "diagnostics",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "≥ 0")
        for name in (
            *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
            *("batch_tokens", "eval_steps", "save_total_limit"),
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        if (self.scan is None) == (self.model is None or self.data is None):
            raise ValueError("give either scan, or both model and data")
        if self.scan is not None and (self.model is not None or self.data is not None):
            raise ValueError("scan holds what model and data would give: leave those out")
        if self.scan is not None and self.objective != "min_p_hinge":
            raise ValueError(
                f"objective {self.objective} needs logits at the predicted temperature: give model "
                "and data"
            )
        if self.early_stopping_patience and not self.eval_fraction:
            raise ValueError(
                "early_stopping_patience needs eval_fraction, the share of documents to measure on"
            )


def _from_text(name: str, kind: type, text: str) -> object:
    """What a text of YAML stands for: 1e-3 and 2G are texts there."""
    if kind is Path:
        return Path(text)
    if kind not in (int, float):
        return text
    try:
        return size(text) if name == "max_memory" else kind(text)
    except ValueError:
        return text  # refused with the other settings, by name


def from_yaml(path: Path) -> dict:
    """Settings in a YAML file, names as in `TrainConfig`. Sizes may be written like 2G.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"config must be a YAML file, got {str(path)!r}, which is no file")
    text = path.read_bytes()
    with foreign(f"config {path} is not YAML"):
        values = yaml.safe_load(text)
    values = {} if values is None else values
    known = {field.name: _kinds(field)[0] for field in fields(TrainConfig)}
    if not isinstance(values, dict):
        raise ValueError(
            f"config {path} must map names of settings to values, got {type(values).__name__}"
        )
    if not set(values) <= set(known):
        unknown = sorted(repr(name) for name in set(values) - set(known))
        raise ValueError(
            f"config {path} must map names of settings to values, got {', '.join(unknown)}"
        )
    return {
        name: _from_text(name, known[name], v) if isinstance(v, str) else v
        for name, v in values.items()
    }


def _folder_name(point: dict[str, float]) -> str:
    """Short where that says it all: gravity=0.05_seed=12345678."""
    exact = {
        name: f"{value:g}" if float(f"{value:g}") == value else repr(value)
        for name, value in point.items()
    }
    return "_".join(f"{name}={value}" for name, value in exact.items())


def sweep(config: TrainConfig, grid: list[str]) -> list[tuple[dict[str, float], TrainConfig]]:
    """The settings of every point of a grid like `["gravity=0.05,0.1", "min_p=0.1,0.2"]`, each with
    a folder of its own.

    Raises:
        ValueError: for an entry of another form or name, a setting or a value that is there twice,
            or one out of range.
    """
    kinds = {field.name: _kinds(field)[0] for field in fields(TrainConfig)}
    axes = {}
    for entry in " ".join(grid).split() or [""]:
        name, _, values = entry.partition("=")
        kind = kinds.get(name)
        if kind not in (int, float) or not values:
            raise ValueError(
                f"sweep must be like gravity=0.05,0.1 with a numeric setting, got {entry!r}"
            )
        if name in axes:
            raise ValueError(f"sweep must name a setting once, got {name} twice")
        try:
            axes[name] = [kind(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"sweep must list numbers for {name}, got {values!r}") from None
        if len(set(axes[name])) < len(axes[name]):
            raise ValueError(
                f"sweep must list a value once, two points would share a folder: {entry}"
            )
    points = [dict(zip(axes, values)) for values in product(*axes.values())]
    checked = [(point, replace(config, **point)) for point in points]
    return [
        (point, replace(settings, output=config.output / _folder_name(point)))
        for point, settings in checked
    ]
