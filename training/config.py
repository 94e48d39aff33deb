"""Settings of a scan and of a training run; each option is written here and nowhere else."""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path

from autodeco_fast.errors import foreign
from autodeco_fast.options import Options, documented, from_text, option, type_of
from autodeco_fast.urls import Location

EASY_WEIGHTS = ("inverse", "none")
AUTODECO = ("autodeco_temperature", "autodeco_top_p", "autodeco_joint")
OBJECTIVES = ("min_p_hinge", "label_free", *AUTODECO, "rewards")
SCHEDULES = ("cosine", "linear", "constant")
WEIGHTINGS = ("unscaled", "scaled", "none")
# Options of some objectives only → which.
_OF_TEMPERATURE, _OF_TOP_P = (AUTODECO[0], AUTODECO[2]), AUTODECO[1:]
_TAKEN_BY = {
    "easy_drop": _OF_TEMPERATURE,
    "weighting": _OF_TEMPERATURE,
    "goldilocks_filter": _OF_TEMPERATURE,
    "steepness": _OF_TOP_P,
    "detach_temperature": AUTODECO[2:],
}
MODEL = "folder or hub id of a causal language model; it stays frozen, in bf16 where that is fast"
DEVICE_MAP = (
    "how transformers places a model that one GPU cannot hold, like auto: over several, then in "
    "memory, then on disk; for one process"
)
_EXAMPLES = "JSONL of prompt+completion, messages, text, or input_ids+labels"


@dataclass(frozen=True, kw_only=True)
class _Selection(Options):
    """Which tokens to learn from."""

    max_length: int = option(
        "tokens of an example, and never more than the model's positions; the rest is cut off",
        1024,
        must_be="at least 2",
    )
    max_rank: int = option(
        "a target that more tokens rank above is impossible, and left out", 100, must_be="≥ 0"
    )
    trivial_prob: float = option(
        "a target that is the argmax and more probable is trivial", 0.9, must_be="in [0, 1]"
    )
    easy_fraction: float = option(
        "share of the trivial tokens that is selected", 0.1, must_be="in [0, 1]"
    )


@documented
@dataclass(frozen=True, kw_only=True)
class ScanConfig(_Selection):
    """What a scan writes down of a model's predictions on some data."""

    model: str = option(MODEL)
    data: str = option(f"{_EXAMPLES}; or the name of a dataset; or stdlib:head")
    output: Location = option(
        "folder for the scan, or its URL on storage that fsspec knows, like s3://bucket/scan; one "
        "begun with the same settings is continued"
    )
    split: str = option("of a dataset that is named", "train")
    batch_tokens: int = option(
        "tokens of a forward pass, padding included", 8192, must_be="at least 1"
    )
    examples_per_shard: int = option(
        "examples whose tokens share a file: at most these are lost when a scan is killed",
        256,
        must_be="at least 1",
    )
    max_bytes: int = option(
        "of all shards together, like 2G; of more, a random part is selected; 0: no limit",
        0,
        must_be="≥ 0",
        is_size=True,
    )
    all_tokens: bool = option(
        "write every token down, not a selection by difficulty: to calibrate and to report on",
        False,
    )
    wishes: bool = option(
        "take every example three times, with wishes in its prompt for less and for more "
        "randomness, so that a head learns to follow them",
        False,
    )
    seed: int = option("of the selection", 0)
    device_map: str | None = option(DEVICE_MAP, None)


@documented
@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Selection):
    """How a head is trained. Names follow transformers' `TrainingArguments` where it has them.

    A scan's tokens are selected already, and are all taken unless the options here select fewer.
    """

    output: Path = option("new folder for the head, metrics.jsonl and checkpoints")
    scan: Location | None = option(
        "folder or URL of a scan to learn from, instead of model and data", None
    )
    model: str | None = option(MODEL, None)
    data: Path | None = option(_EXAMPLES, None)
    objective: str = option(
        "what to minimise; label_free learns from the model's own probabilities, at every token; "
        "rewards needs model, prompts and reward, or model and rollouts",
        OBJECTIVES[0],
        choices=OBJECTIVES,
    )
    head: Path | None = option(
        "folder of a head to start from, with its top-p head if it has one; by default a new one",
        None,
    )
    min_p: float | None = option(
        "the cut the head will be used with; by default the one of head, 0.1 for a new one",
        None,
        must_be="in (0, 1)",
    )
    gravity: float = option(
        "λ, the share of the reachable reference tokens that may fall outside the cut; for "
        "label_free, of the model's own probability",
        0.1,
        must_be="in [0, 1)",
    )
    wish_shift: float = option(
        "of a scan with wishes: λ is 1 + this times as large behind a wish for less randomness, "
        "and 1 - this times behind one for more",
        0.9,
        must_be="in [0, 1]",
    )
    easy_weight: str = option(
        "what a selected trivial token counts for: inverse is 1/easy_fraction, as if all were "
        "there; none is 1: errors then count for more where the model is sure",
        EASY_WEIGHTS[0],
        choices=EASY_WEIGHTS,
    )
    power: int = option("of the hinge", 1, must_be="1 or 2")
    easy_drop: float = option(
        "share of the targets that are the argmax which AutoDeco's temperature loss leaves out at "
        "random",
        0.6,
        must_be="in [0, 1]",
    )
    goldilocks_filter: bool = option(
        "let max_rank, trivial_prob, easy_fraction and easy_weight select the tokens of AutoDeco's "
        "temperature loss, as they do for the hinge, instead of easy_drop",
        False,
    )
    weighting: str = option(
        "what AutoDeco's temperature loss multiplies a token's loss by: its probability at "
        "temperature 1 (unscaled) or T (scaled), or 1",
        WEIGHTINGS[0],
        choices=WEIGHTINGS,
    )
    steepness: float = option("of AutoDeco's soft top-p", 30.0, must_be="≥ 0")
    detach_temperature: bool = option(
        "let AutoDeco's soft top-p loss teach the top-p head only", False
    )
    num_train_epochs: int = option("passes over the data", 1, must_be="at least 1")
    max_steps: int = option("stop after so many optimizer steps; 0: no limit", 0, must_be="≥ 0")
    per_device_train_batch_size: int = option(
        "examples a process runs at once", 4, must_be="at least 1"
    )
    gradient_accumulation_steps: int = option(
        "such batches a process adds up before a step", 1, must_be="at least 1"
    )
    batch_tokens: int = option(
        "tokens a process takes from a scan in a step", 2048, must_be="at least 1"
    )
    learning_rate: float = option("AdamW's, after the warm-up", 1e-3, must_be="positive")
    lr_scheduler_type: str = option(
        "of the rate after the warm-up; cosine and linear fall to zero",
        SCHEDULES[0],
        choices=SCHEDULES,
    )
    warmup_ratio: float = option("share of the steps that warm up", 0.05, must_be="in [0, 1]")
    weight_decay: float = option("AdamW's", 0.01, must_be="≥ 0")
    max_grad_norm: float = option(
        "longer gradients are shortened to this norm; 0: none is", 0.0, must_be="≥ 0"
    )
    eval_fraction: float = option(
        "share of the documents held out to measure the loss on", 0.0, must_be="in [0, 1)"
    )
    eval_steps: int = option("steps between such measurements", 50, must_be="at least 1")
    early_stopping_patience: int = option(
        "stop after so many measurements without a better loss, the best head stays; 0: never",
        0,
        must_be="≥ 0",
    )
    save_steps: int = option("steps between checkpoints; 0: none", 0, must_be="≥ 0")
    save_total_limit: int = option("newest checkpoints that stay", 2, must_be="at least 1")
    max_memory: int = option(
        "bytes of a scan's tokens in a process at a time, like 2G; 0: no limit",
        0,
        must_be="≥ 0",
        is_size=True,
    )
    diagnostics: int = option(
        "tokens a step whose T and T* diagnostics.jsonl records; 0: none", 0, must_be="≥ 0"
    )
    report_to: str = option(
        "trackers of accelerate (tensorboard, wandb …), separated by commas", "none"
    )
    resume: bool = option("continue from the newest checkpoint in output", False)
    seed: int = option("of the head's weights, the order of the data and the selection", 0)

    def __post_init__(self):
        super().__post_init__()
        if self.objective == "rewards":
            raise ValueError("objective rewards has settings of its own: RewardConfig")
        if (self.scan is None) == (self.model is None or self.data is None):
            raise ValueError("give either scan, or both model and data")
        if self.scan is not None and (self.model is not None or self.data is not None):
            raise ValueError("scan holds what model and data would give: leave those out")
        for each in fields(self):
            taken_by = _TAKEN_BY.get(each.name, OBJECTIVES)
            if self.objective not in taken_by and getattr(self, each.name) != each.default:
                whose = " and ".join(taken_by)
                raise ValueError(f"{each.name} is for objective {whose}, not {self.objective}")
        if self.objective == "autodeco_top_p" and self.head is None:
            raise ValueError(
                "objective autodeco_top_p needs head, a folder: its temperatures stay as they are"
            )
        if self.early_stopping_patience and not self.eval_fraction:
            raise ValueError(
                "early_stopping_patience needs eval_fraction, the share of documents to measure on"
            )


def from_yaml(path: Path, *others: type) -> dict:
    """Settings in a YAML file, names as in `TrainConfig` and other dataclasses.

    Sizes may be written like 2G.

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
    expected = f"config {path} must map names of settings to values"
    if not isinstance(values, dict):
        raise ValueError(f"{expected}, got {type(values).__name__}")
    known = {field.name: field for each in (TrainConfig, *others) for field in fields(each)}
    for name in sorted(map(str, set(values) - set(known))):
        meant = get_close_matches(name, known, n=1)
        if meant:
            raise ValueError(f"config {path}: unknown setting {name}; did you mean {meant[0]}?")
    if not set(values) <= set(known):
        unknown = sorted(repr(name) for name in set(values) - set(known))
        raise ValueError(f"{expected}, got {', '.join(unknown)}")
    return {
        name: from_text(known[name], value) if isinstance(value, str) else value
        for name, value in values.items()
    }


def _folder_name(point: dict[str, float]) -> str:
    """Short where that says it all: gravity=0.05_seed=12345678."""
    exact = {
        name: f"{value:g}" if float(f"{value:g}") == value else repr(value)
        for name, value in point.items()
    }
    return "_".join(f"{name}={value}" for name, value in exact.items())


def sweep(config: TrainConfig, grid: list[str]) -> list[tuple[dict[str, float], TrainConfig]]:
    """The settings of every point of a grid like `["gravity=0.05,0.1", "min_p=0.1,0.2"]`.

    Each point has its folder inside the output.

    Raises:
        ValueError: for an entry of another form or name, a setting or a value that is there twice,
            or one out of range.
    """
    types = {field.name: type_of(field)[0] for field in fields(TrainConfig)}
    axes = {}
    for entry in " ".join(grid).split() or [""]:
        name, _, values = entry.partition("=")
        number = types.get(name)
        if number not in (int, float) or not values:
            raise ValueError(
                f"sweep must be like gravity=0.05,0.1 with a numeric setting, got {entry!r}"
            )
        if name in axes:
            raise ValueError(f"sweep must name a setting once, got {name} twice")
        try:
            axes[name] = [number(value) for value in values.split(",")]
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
