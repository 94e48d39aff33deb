"""The thin training loop: tokens from a source, an objective, AdamW on the head.

Every process takes its share of a step's tokens and adds up gradients of *summed* losses
(`training/step.py`), so neither accumulation nor the number of processes changes what is computed.
A step depends on seed, step number and parameters alone, so a run that was killed and resumed ends
in the same bits.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.autodeco.own_heads import TOP_P_FOLDER
from autodeco_fast.checkpoint import CONFIG_NAME, check_finite
from autodeco_fast.heads import DEFAULT_MIN_P
from autodeco_fast.training import checkpoints
from autodeco_fast.training.batches import Source
from autodeco_fast.training.checkpoints import Progress
from autodeco_fast.training.config import AUTODECO, TrainConfig
from autodeco_fast.training.head_folder import (
    check_model,
    check_resumed,
    check_width,
    min_p_of,
    written_settings,
)
from autodeco_fast.training.metrics import Log, Totals
from autodeco_fast.training.objectives import (
    AutoDecoJoint,
    AutoDecoTemperature,
    AutoDecoTopP,
    LabelFree,
    MinPHinge,
    Objective,
)
from autodeco_fast.training.processes import Processes, start_accelerator
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.step import Step, differentiate, trained

_Config = TypeVar("_Config", TrainConfig, RewardConfig)
_OBJECTIVES = {
    "min_p_hinge": MinPHinge,
    "label_free": LabelFree,
    **dict(zip(AUTODECO, (AutoDecoTemperature, AutoDecoTopP, AutoDecoJoint))),
}


def objective_of(config: TrainConfig) -> Objective:
    kind = _OBJECTIVES[config.objective]
    options = {f.name: getattr(config, f.name) for f in fields(kind) if hasattr(config, f.name)}
    if options.get("weighting") == "none":
        options["weighting"] = None
    return kind(**options)


def with_min_p(config: _Config) -> _Config:
    """The settings with the Min-P that counts: theirs, else that of the head they start from."""
    if config.head is None:
        min_p = DEFAULT_MIN_P if config.min_p is None else config.min_p
    else:
        head = TemperatureHead.from_pretrained(config.head)
        min_p = min_p_of(head, config.min_p)
    return replace(config, min_p=min_p)


def new_head(config: TrainConfig | RewardConfig, hidden_size: int) -> nn.Module:
    """What the objective trains: what `config.head` holds, else a head from the run's seed.

    Where its temperatures are trained, it gets the run's Min-P and loses the offset of a
    calibration, which would promise nothing of them.

    Raises:
        ValueError: if there is no head in `config.head`, or of another width.
    """
    torch.manual_seed(config.seed)
    if config.head is None:
        head = TemperatureHead(hidden_size)
    else:
        head = TemperatureHead.from_pretrained(config.head)
        check_width(head, hidden_size)
    if config.objective != "autodeco_top_p":
        head.min_p, head.offset = config.min_p, 0.0
    if config.objective not in ("autodeco_top_p", "autodeco_joint"):
        return head
    return nn.ModuleDict({"temp_head": head, "top_p_head": _top_p_head(config, hidden_size)})


def _top_p_head(config: TrainConfig, hidden_size: int) -> TopPHead:
    folder = None if config.head is None else config.head / TOP_P_FOLDER
    if folder is None or not folder.is_dir():
        return TopPHead(hidden_size)
    head = TopPHead.from_pretrained(folder)
    check_width(head, hidden_size)
    return head


def save_heads(head: nn.Module, folder: Path) -> None:
    check_finite(head.state_dict(), f"the weights for {str(folder)!r}")  # of both before either
    if isinstance(head, nn.ModuleDict):
        head["top_p_head"].save_pretrained(folder / TOP_P_FOLDER)
        head = head["temp_head"]
    head.save_pretrained(folder)


def learning_rate(step: int, steps: int, warmup_ratio: float, schedule: str = "cosine") -> float:
    """Factor of the learning rate: a linear warm-up, then half a cosine or a line to zero, or 1."""
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return 1.0 - done
    return 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * done)))


@torch.no_grad()
def held_out_loss(
    source: Source, head: nn.Module, objective: Objective, processes: Processes
) -> float:
    """The objective's terms added up, each a mean over the held-out tokens of all processes."""
    rank, world = processes.rank, processes.world
    parameters = trained(head)[:1]
    total = Step.zero(objective.names, parameters)
    for step in range(source.steps_per_epoch(world)):
        for batch in source.batches(0, step, rank, world):
            total = total + differentiate(objective(batch, source.lm_head, head), parameters)[0]
    return sum(total.reduce(processes.sum).means().values())


def _no_start(steps: int, done: int) -> None:
    pass


def _no_step(metrics: dict) -> None:
    pass


def train(
    source: Source,
    config: TrainConfig,
    *,
    measure_on: Source | None = None,
    accelerator=None,
    on_start: Callable[[int, int], None] = _no_start,
    on_step: Callable[[dict], None] = _no_step,
) -> nn.Module:
    """Trains a head and writes it, its settings and its metrics to `config.output`.

    Args:
        source: of tokens, the same in every process.
        measure_on: held-out tokens, for `eval_steps` and early stopping.
        accelerator: one of `accelerate`; made here if None.
        on_start: called with the number of optimizer steps, and how many a resumed run has done.
        on_step: called with a step's metrics, in the main process.

    Raises:
        ValueError: if `config.output` holds a head already, that in `config.head` is none or of
            another model, a loss or a weight is not finite, no step selected a token, or another
            process has ended. No head is written then.
    """
    mine = accelerator is None
    accelerator = start_accelerator() if mine else accelerator
    check_output(config)
    run = _Run(source, config, measure_on=measure_on, processes=Processes(accelerator))
    head = run.run(on_start, on_step)
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

    def __init__(
        self,
        source: Source,
        config: TrainConfig,
        *,
        measure_on: Source | None,
        processes: Processes,
    ):
        config = with_min_p(config)
        self.source, self.config, self.measure_on = source, config, measure_on
        self.processes = processes
        self.per_epoch = source.steps_per_epoch(processes.world)
        steps = self.per_epoch * config.num_train_epochs
        self.steps = min(steps, config.max_steps or steps)
        if config.head is not None:
            check_model(config.head, lambda: source.identity()["lm_head"])
        self.head = new_head(config, source.hidden_size).to(source.device)
        if config.objective == "autodeco_top_p":
            self.head["temp_head"].requires_grad_(False)
        self.parameters = trained(self.head)
        self.objective = objective_of(config)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.progress, self.best = Progress(), None
        self.totals = Totals()  # of all steps
        self.log: Log | None = None  # in the main process

    def run(
        self, on_start: Callable[[int, int], None], on_step: Callable[[dict], None]
    ) -> nn.Module:
        config = self.config
        newest = checkpoints.newest(config.output) if config.resume else None
        # A step's width is so many tokens or examples of every process.
        identity = {**self.source.identity(), "processes": self.processes.world}
        settings = written_settings(config, identity)
        if newest is not None:
            check_resumed(config.output, settings)
            self.progress, self.best = checkpoints.load(newest, self.head, self.optimizer)
        progress = self.progress
        if self.processes.is_main:
            self.log = Log(config, settings, progress.step)
        on_start(self.steps, progress.step)
        while progress.step < self.steps and not self._out_of_patience():
            metrics = self._step()
            if self._measures():
                metrics["eval_loss"] = self._measure()
            if self.log:
                self.log.write(metrics)
                on_step(metrics)
                if config.save_steps and progress.step % config.save_steps == 0:
                    self._save()
        if not progress.selected_tokens:
            raise ValueError(f"no token was left to learn from: {self.totals.why_nothing(config)}")
        if self.best is not None and config.early_stopping_patience:
            self.head.load_state_dict(self.best)
        if self.log:
            save_heads(self.head, config.output)
        self.processes.wait()
        return self.head

    def _step(self) -> dict:
        """One optimizer step; its metrics."""
        total, totals = self._gradients()
        self.totals.values += totals.values
        self.progress.selected_tokens += int(totals.values[0])
        losses = total.means()
        self._check_finite(losses)
        rate = self.config.learning_rate * learning_rate(
            self.progress.step,
            self.steps,
            warmup_ratio=self.config.warmup_ratio,
            schedule=self.config.lr_scheduler_type,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total.assign(self.parameters)
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        terms = {f"loss_{name}": value for name, value in losses.items()} if len(losses) > 1 else {}
        return {
            "step": self.progress.step,
            "loss": sum(losses.values()),
            **terms,
            **totals.means(),
            "learning_rate": rate,
        }

    def _gradients(self) -> tuple[Step, Totals]:
        """Sums of a step over all batches and processes."""
        total, totals = Step.zero(self.objective.names, self.parameters), Totals()
        epoch, step = divmod(self.progress.step, self.per_epoch)
        for batch in self.source.batches(epoch, step, self.processes.rank, self.processes.world):
            sums = self.objective(batch, self.source.lm_head, self.head)
            one, seen = differentiate(sums, self.parameters)
            total = total + one
            totals.add(seen, self.config)
            if self.log and self.config.diagnostics:
                self.log.diagnose(self.progress.step + 1, seen, self.config)
        total = total.reduce(self.processes.sum)
        totals.values = self.processes.sum(totals.values)
        return total, totals

    def _check_finite(self, losses: dict[str, float]) -> None:
        if not math.isfinite(sum(losses.values())):
            found = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            raise ValueError(
                f"the loss must be finite, got {found} at step {self.progress.step + 1}: no head "
                f"is written; learning_rate {self.config.learning_rate:g} may be too high, or "
                "hidden states are NaN"
            )

    def _measures(self) -> bool:
        """Whether the held-out loss is due."""
        step = self.progress.step
        due = step % self.config.eval_steps == 0 or step == self.steps
        return due and self.measure_on is not None

    def _measure(self) -> float:
        loss = held_out_loss(self.measure_on, self.head, self.objective, self.processes)
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.without_better = loss, 0
            self.best = checkpoints.tensors_of(self.head)
        else:
            self.progress.without_better += 1
        return loss

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.progress.without_better >= patience

    def _save(self) -> None:
        checkpoints.save(
            self.config.output,
            head=self.head,
            optimizer=self.optimizer,
            progress=self.progress,
            best=self.best,
            limit=self.config.save_total_limit,
        )
