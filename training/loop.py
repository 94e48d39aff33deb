"""The thin training loop: tokens from a source, an objective, AdamW on the head.

Every process takes its share of a step's tokens and adds up gradients of *summed* losses
(`training/step.py`), so neither accumulation nor the number of processes changes what is computed.
A step depends on seed, step number and parameters alone, so a run that was killed and resumed ends
in the same bits.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from autodeco_fast import TemperatureHead, TopPHead, required_temperature
from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.files import append_text, write_text
from autodeco_fast.losses import IMPOSSIBLE, TRIVIAL, difficulty
from autodeco_fast.training import checkpoints
from autodeco_fast.training.batches import Source
from autodeco_fast.training.checkpoints import Progress
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.head_folder import DIAGNOSTICS_NAME, METRICS_NAME, SETTINGS_NAME
from autodeco_fast.training.objectives import AutoDecoJoint, AutoDecoTemperature, MinPHinge
from autodeco_fast.training.step import Seen, Step, differentiate


def objective_of(config: TrainConfig):
    if config.objective == "autodeco_temperature":
        return AutoDecoTemperature()
    if config.objective == "autodeco_joint":
        return AutoDecoJoint()
    names = ("min_p", "gravity", "power", "max_rank", "trivial_prob", "easy_fraction")
    return MinPHinge(**{name: getattr(config, name) for name in names})


def new_head(config: TrainConfig, hidden_size: int) -> nn.Module:
    """What the objective trains, from the run's seed; it knows the run's Min-P."""
    torch.manual_seed(config.seed)
    head = TemperatureHead(hidden_size, min_p=config.min_p)
    if config.objective != "autodeco_joint":
        return head
    return nn.ModuleDict({"temp_head": head, "top_p_head": TopPHead(hidden_size)})


def save_heads(head: nn.Module, folder: Path) -> None:
    if isinstance(head, nn.ModuleDict):
        head["top_p_head"].save_pretrained(folder / "top_p_head")
        head = head["temp_head"]
    head.save_pretrained(folder)


class Totals:
    """Sums over a step's tokens, `[7]`: learned from, targets, T, T* and covered of the learned
    ones, impossible, trivial."""

    def __init__(self):
        self.values = torch.zeros(7, dtype=torch.float64)

    def add(self, seen: Seen, config: TrainConfig) -> None:
        T, learned = seen.temperature, seen.learned
        required = required_temperature(seen.stats, config.min_p)
        bucket = difficulty(seen.stats, max_rank=config.max_rank, trivial_prob=config.trivial_prob)
        sums = (
            learned.sum(),
            (seen.stats.rank >= 0).sum(),
            torch.where(learned, T, 0.0).sum(),
            torch.where(learned, required, 0.0).sum(),
            (learned & (required <= T)).sum(),
            (bucket == IMPOSSIBLE).sum(),
            (bucket == TRIVIAL).sum(),
        )
        self.values += torch.stack([s.double().cpu() for s in sums])

    def why_nothing(self, config: TrainConfig) -> str:
        """Which setting left no token to learn from."""
        _, targets, *_, impossible, trivial = (int(x) for x in self.values)
        if config.objective != "min_p_hinge":
            return f"all {targets:,} targets were left out as easy; another seed leaves out others"
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
        kept, targets, *sums = self.values.tolist()[:5]
        names = ("temperature", "required_temperature", "coverage")
        return {
            **{n: s / max(kept, 1) for n, s in zip(names, sums)},
            "kept_tokens": int(kept),
            "target_tokens": int(targets),
        }


def learning_rate(step: int, steps: int, warmup_ratio: float, schedule: str = "cosine") -> float:
    """Factor of the learning rate: a linear warm-up, then half a cosine to zero, or 1."""
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * float(
        torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup)))
    )


@torch.no_grad()
def held_out_loss(source: Source, head: nn.Module, objective, accelerator) -> float:
    """The objective's terms added up, each a mean over the held-out tokens, split over the
    processes."""
    rank, world = accelerator.process_index, accelerator.num_processes
    parameters = list(head.parameters())[:1]
    total = Step.zero(objective.names, parameters)
    for step in range(source.steps_per_epoch(world)):
        for batch in source.batches(0, step, rank, world):
            sums = objective(batch, source.lm_head, head)
            total = total + differentiate(sums, parameters)[0]
    return sum(total.reduce(lambda x: accelerator.reduce(x, "sum")).means().values())


def train(
    source: Source,
    config: TrainConfig,
    *,
    measure_on: Source | None = None,
    accelerator=None,
    on_start: Callable[[int, int], None] = lambda steps, done: None,
    on_step: Callable[[dict], None] = lambda metrics: None,
) -> nn.Module:
    """Trains a head and writes it, its settings and its metrics to `config.output`.

    Args:
        source: of tokens, the same in every process.
        measure_on: held-out tokens, for `eval_steps` and early stopping.
        accelerator: one of `accelerate`; made here if None.
        on_start: called with the number of optimizer steps, and how many a resumed run has done.
        on_step: called with a step's metrics, in the main process.

    Raises:
        ValueError: if `config.output` holds a head already, a loss or a weight is not finite, or no
            step kept a token. No head is written then.
    """
    from accelerate import Accelerator

    mine = accelerator is None
    accelerator = Accelerator() if mine else accelerator
    check_output(config)
    head = _Run(source, config, measure_on, accelerator, on_start, on_step).run()
    if mine:
        accelerator.end_training()  # several processes must close their group before they exit
    return head


def check_output(config: TrainConfig) -> None:
    """Refuses a folder whose contents would be lost."""
    if (config.output / CONFIG_NAME).exists():
        raise ValueError(f"output {str(config.output)!r} holds a head already; name another folder")
    if checkpoints.newest(config.output) and not config.resume:
        raise ValueError(
            f"output {str(config.output)!r} holds checkpoints; give --resume to continue, or "
            "another folder"
        )


class _Run:
    """One training run in one process."""

    def __init__(self, source, config, measure_on, accelerator, on_start, on_step):
        self.source, self.config, self.measure_on = source, config, measure_on
        self.accelerator, self.on_start, self.on_step = accelerator, on_start, on_step
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.head = new_head(config, source.hidden_size).to(source.device)
        self.objective = objective_of(config)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.learning_rate, weight_decay=0.01
        )
        self.progress, self.best = Progress(), None
        self.totals = Totals()  # of all steps

    def run(self) -> nn.Module:
        config, progress = self.config, self.progress
        per_epoch = self.source.steps_per_epoch(self.world)
        steps = per_epoch * config.num_train_epochs
        steps = min(steps, config.max_steps or steps)
        folder = checkpoints.newest(config.output) if config.resume else None
        if folder is not None:
            self.progress, self.best = checkpoints.load(folder, self.head, self.optimizer)
            progress = self.progress
        log = (
            _Log(config, self.source.identity(), progress.step)
            if self.accelerator.is_main_process
            else None
        )
        self.on_start(steps, progress.step)
        while progress.step < steps and not self._out_of_patience():
            metrics = self._step(*divmod(progress.step, per_epoch), steps, log)
            progress.kept_tokens += metrics["kept_tokens"]
            progress.step += 1
            if self.measure_on is not None and (
                progress.step % config.eval_steps == 0 or progress.step == steps
            ):
                metrics["eval_loss"] = self._measure()
            if log:
                log.write(metrics)
                self.on_step(metrics)
            if config.save_steps and progress.step % config.save_steps == 0 and log:
                checkpoints.save(
                    config.output,
                    self.head,
                    self.optimizer,
                    progress,
                    self.best,
                    config.save_total_limit,
                )
        if not progress.kept_tokens:
            raise ValueError(f"no token was left to learn from: {self.totals.why_nothing(config)}")
        if self.best is not None and config.early_stopping_patience:
            self.head.load_state_dict(self.best)
        if log:
            save_heads(self.head, config.output)
        self.accelerator.wait_for_everyone()
        return self.head

    def _step(self, epoch: int, step: int, steps: int, log: "_Log | None") -> dict:
        config, parameters = self.config, list(self.head.parameters())
        total, totals = Step.zero(self.objective.names, parameters), Totals()
        for batch in self.source.batches(epoch, step, self.rank, self.world):
            sums = self.objective(batch, self.source.lm_head, self.head)
            gradients, seen = differentiate(sums, parameters)
            total = total + gradients
            totals.add(seen, config)
            if log and config.diagnostics:
                log.diagnose(self.progress.step + 1, seen, config)

        def added(x: torch.Tensor) -> torch.Tensor:
            return self.accelerator.reduce(x, "sum")

        total = total.reduce(added)
        totals.values = added(totals.values.to(self.accelerator.device)).cpu()
        self.totals.values += totals.values
        losses = total.means()
        if not math.isfinite(sum(losses.values())):
            found = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            raise ValueError(
                f"the loss must be finite, got {found} at step {self.progress.step + 1}: no head "
                "is written; "
                f"learning_rate {config.learning_rate:g} may be too high, or hidden states are NaN"
            )
        rate = config.learning_rate * learning_rate(
            self.progress.step, steps, config.warmup_ratio, config.lr_scheduler_type
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total.assign(parameters)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        extra = {f"loss_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
        return {
            "step": self.progress.step + 1,
            "loss": sum(losses.values()),
            **extra,
            **totals.means(),
            "learning_rate": rate,
        }

    def _measure(self) -> float:
        loss = held_out_loss(self.measure_on, self.head, self.objective, self.accelerator)
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.without_better = loss, 0
            self.best = checkpoints.tensors_of(self.head)
        else:
            self.progress.without_better += 1
        return loss

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.progress.without_better >= patience


class _Log:
    """`training.json`, `metrics.jsonl` and `diagnostics.jsonl`: whole lines, none beyond the step a
    resume begins at."""

    def __init__(self, config: TrainConfig, identity: dict[str, str], done: int):
        self.started = time.perf_counter()
        self.metrics, self.diagnostics = (
            config.output / METRICS_NAME,
            config.output / DIAGNOSTICS_NAME,
        )
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(config).items()
        }
        settings |= identity
        write_text(config.output / SETTINGS_NAME, json.dumps(settings, indent=1) + "\n")
        for path in (self.metrics, *([self.diagnostics] if config.diagnostics else [])):
            write_text(path, "".join(self._until(path, done)))

    @staticmethod
    def _until(path: Path, done: int) -> list[str]:
        lines = (
            path.read_text(encoding="utf-8").splitlines(keepends=True)
            if done and path.exists()
            else []
        )
        return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]

    def write(self, metrics: dict) -> None:
        metrics["seconds"] = time.perf_counter() - self.started
        self._append(self.metrics, [metrics])

    def diagnose(self, step: int, seen: Seen, config: TrainConfig) -> None:
        """The first few tokens of a batch: predicted and required temperature, and whether the cut
        held."""
        need, T = required_temperature(seen.stats, config.min_p), seen.temperature
        rows = zip(*(x[: config.diagnostics].tolist() for x in (T, need, need <= T, seen.learned)))
        names = ("temperature", "required_temperature", "covered", "learned")
        self._append(self.diagnostics, [{"step": step, **dict(zip(names, row))} for row in rows])

    @staticmethod
    def _append(path: Path, records: list[dict]) -> None:
        append_text(path, "".join(json.dumps(record) + "\n" for record in records))
