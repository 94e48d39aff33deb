"""What a training run says of its steps: sums over tokens, and the files they end in."""

import json
import time
from pathlib import Path

import torch

from autodeco_fast import required_temperature
from autodeco_fast.checkpoint import SETTINGS_NAME
from autodeco_fast.files import append_text, write_text
from autodeco_fast.losses import IMPOSSIBLE, TRIVIAL, difficulty
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.head_folder import DIAGNOSTICS_NAME, METRICS_NAME
from autodeco_fast.training.step import Seen


class Totals:
    """Sums over tokens, `[8]`.

    Selected tokens, targets; weight of the selected ones, and weighted by it T, T* and covered;
    impossible, trivial.
    """

    def __init__(self):
        self.values = torch.zeros(8, dtype=torch.float64)

    def add(self, seen: Seen, config: TrainConfig) -> None:
        required, T = required_temperature(seen.stats, config.min_p), seen.temperature
        weight = seen.weight.double()
        bucket = difficulty(seen.stats, max_rank=config.max_rank, trivial_prob=config.trivial_prob)
        sums = (
            seen.selected.sum(),
            (seen.stats.rank >= 0).sum(),
            weight.sum(),
            *(torch.where(seen.selected, weight * x, 0.0).sum() for x in (T, required)),
            (weight * (required <= T)).sum(),
            (bucket == IMPOSSIBLE).sum(),
            (bucket == TRIVIAL).sum(),
        )
        self.values += torch.stack([s.double().cpu() for s in sums])

    def why_nothing(self, config: TrainConfig) -> str:
        """Which setting left no token to learn from."""
        _, targets, *_, impossible, trivial = (int(x) for x in self.values)
        if config.objective != "min_p_hinge" and not config.goldilocks_filter:
            return (
                f"easy_drop {config.easy_drop:g} left out all {targets:,} targets, which are the "
                "model's argmax"
            )
        if impossible == targets:
            return f"max_rank {config.max_rank} dropped all {targets:,} targets"
        if impossible + trivial == targets:
            return (
                f"easy_fraction {config.easy_fraction:g} dropped all {trivial:,} targets that "
                "max_rank had left"
            )
        return (
            f"min_p {config.min_p:g} puts every target that was left out of reach of the highest "
            "temperature"
        )

    def means(self) -> dict[str, float]:
        selected, targets, weight, T, required, covered = self.values.tolist()[:6]
        return {
            "temperature": T / (weight or 1.0),
            "required_temperature": required / (weight or 1.0),
            "coverage": covered / (weight or 1.0),
            "selected_tokens": int(selected),
            "target_tokens": int(targets),
        }


class Log:
    """`training.json`, `metrics.jsonl` and `diagnostics.jsonl`.

    Lines are whole, and none is of a step beyond the one that a resume begins at.
    """

    def __init__(self, config: TrainConfig, settings: dict, done: int):
        """
        Args:
            settings: the `written_settings`.
            done: steps that a resume begins at.
        """
        self.started = time.perf_counter()
        self.metrics = config.output / METRICS_NAME
        self.diagnostics = config.output / DIAGNOSTICS_NAME
        self._diagnosed = (0, 0)  # a step, and how many of its tokens are in there
        write_text(config.output / SETTINGS_NAME, json.dumps(settings, indent=1) + "\n")
        for path in (self.metrics, *([self.diagnostics] if config.diagnostics else [])):
            write_text(path, "".join(lines_until(path, done)))

    def write(self, metrics: dict) -> None:
        metrics["seconds"] = time.perf_counter() - self.started
        _append(self.metrics, [metrics])

    def diagnose(self, step: int, seen: Seen, config: TrainConfig) -> None:
        """T, T* and whether the cut held, of the first few tokens of a step, batch by batch."""
        if step != self._diagnosed[0]:
            self._diagnosed = (step, 0)
        n = config.diagnostics - self._diagnosed[1]
        required = required_temperature(seen.stats, config.min_p)[:n]
        T, selected = seen.temperature[:n], seen.selected[:n]
        names = ("temperature", "required_temperature", "covered", "selected")
        columns = (T.tolist(), required.tolist(), (required <= T).tolist(), selected.tolist())
        records = [{"step": step, **dict(zip(names, values))} for values in zip(*columns)]
        _append(self.diagnostics, records)
        self._diagnosed = (step, self._diagnosed[1] + len(records))


def lines_until(path: Path, done: int) -> list[str]:
    """The whole lines of a file that are of the first `done` steps."""
    if not done or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]


def _append(path: Path, records: list[dict]) -> None:
    append_text(path, "".join(json.dumps(record) + "\n" for record in records))
